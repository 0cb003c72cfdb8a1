"""One adapter's factors as tensors, read from its safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_hub_sdk.registry.adapter_config import AdapterConfig
from lora_hub_sdk.registry.admission import FACTOR_KEY

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraFactors:
    """The delta s B A of one linear module: ``a`` (r, d_in), ``b`` (d_out, r), ``scale`` s.

    Composition takes b by its columns, so it is quickest where their memory is contiguous.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterFactors:
    """All modules of one adapter. ``digest`` is the content that they were read from."""

    digest: str
    modules: Mapping[str, LoraFactors]

    @cached_property
    def size_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for factors in self.modules.values()
            for tensor in (factors.a, factors.b)
        )


def factors_from_bytes(weights: bytes, config: AdapterConfig, digest: str) -> AdapterFactors:
    """Tensors of an admitted file, in the dtype they are stored in."""
    from safetensors.torch import load

    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(weights).items():
        match = FACTOR_KEY.fullmatch(key)
        assert match is not None, f"{key} passed admission"
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    return AdapterFactors(
        digest,
        {
            module: LoraFactors(found["A"], found["B"].t().contiguous().t(), config.scale(module))
            for module, found in sides.items()
        },
    )
