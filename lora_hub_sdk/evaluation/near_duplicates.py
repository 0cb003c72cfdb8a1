"""Adapters that are almost the same: a digest tells exact copies, this tells copies that were changed a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Adapter

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two adapters by name and the cosine between all that they add to the base model's weights."""

    first: str
    second: str
    cosine: float


def near_duplicates(adapters: Sequence[Adapter], *, above: float = 0.9) -> list[NearDuplicate]:
    """Pairs of adapters whose weights nearly agree, the nearest first.

    A copy with noise of a share p of its norm is at about 1 / (1 + p^2). Two trainings from other first factors are at
    about 0, from the same first factors and on related tasks at up to 0.8. All factors are in memory at once.

    Args:
        adapters: for one base model, as ``hub.list(base_model=...)`` gives them.
        above: pairs up to this cosine are left out.

    Raises:
        ConfigurationError: adapters for different base models.
        AdapterChangedError: the files of one are gone or have changed.
    """
    cosine = weight_cosines(adapters)
    pairs = zip(*np.nonzero(np.triu(cosine > above, 1)), strict=True)
    found = [NearDuplicate(adapters[a].name, adapters[b].name, float(cosine[a, b])) for a, b in pairs]
    return sorted(found, key=lambda pair: -pair.cosine)


def weight_cosines(adapters: Sequence[Adapter]) -> NDArray[np.float32]:
    """(n, n) cosine between the adapters' s B A, all modules together; what is saved beside factors does not count.

    Errors are as of ``near_duplicates``.
    """
    import torch

    from lora_hub_sdk.engine.adapter_file import load_factors

    if len(bases := {adapter.base_model for adapter in adapters}) > 1:
        raise ConfigurationError(
            f"adapters for {', '.join(sorted(bases))} cannot be compared; give those of one base model"
        )
    loaded = [load_factors(adapter).modules for adapter in adapters]
    products = torch.zeros(len(loaded), len(loaded), dtype=torch.float64)
    for path in {path: None for modules in loaded for path in modules}:
        places = [place for place, modules in enumerate(loaded) if path in modules]
        factors = [loaded[place][path] for place in places]
        a = torch.cat([one.a.float() for one in factors])
        b = torch.cat([one.scale * one.b.float() for one in factors], dim=1)
        owner = torch.repeat_interleave(torch.tensor(places), torch.tensor([one.rank for one in factors]))
        products += _inner_products(a, b, owner, len(loaded))
    lengths = products.diagonal().clamp_min(1e-30).sqrt()
    cosine: NDArray[np.float32] = (products / lengths / lengths[:, None]).float().numpy()
    return cosine


def _inner_products(a: Tensor, b: Tensor, owner: Tensor, count: int) -> Tensor:
    """<B_i A_i, B_j A_j> of every two adapters, (count, count), from the stacked a (R, d_in), b (d_out, R).

    The trace of A_i' B_i' B_j A_j is the sum over both ranks of (A_i A_j') * (B_i' B_j): no product is made dense.
    """
    ranks = ((a @ a.T) * (b.T @ b)).double()
    rows = ranks.new_zeros(count, len(owner)).index_add_(0, owner, ranks)
    found: Tensor = ranks.new_zeros(count, count).index_add_(1, owner, rows)
    return found


def write_noisy(source: Path, target: Path, *, share: float, seed: int = 0) -> Path:
    """Copy an adapter's folder with noise on its factors, of ``share`` of each one's norm; returns the new folder.

    A stand-in for what others publish again after a rounding, a merge or some more steps of training.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
    from lora_hub_sdk.registry.admission import WEIGHTS_FILE

    random = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=random)
        changed: Tensor = tensor.float() + share * tensor.float().norm() / noise.norm() * noise
        return changed.to(tensor.dtype)

    tensors = load_file(source / WEIGHTS_FILE)
    changed = {name: noisy(tensor) if ".lora_" in name else tensor for name, tensor in sorted(tensors.items())}
    target.mkdir(parents=True, exist_ok=True)
    save_file(changed, target / WEIGHTS_FILE, metadata={"format": "pt"})
    (target / CONFIG_FILE).write_bytes((source / CONFIG_FILE).read_bytes())
    return target
