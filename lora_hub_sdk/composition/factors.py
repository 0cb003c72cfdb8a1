"""One adapter's factors as tensors: views into the content of its safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.registry.adapter_config import AdapterConfig
from lora_hub_sdk.registry.admission import FACTOR_KEY

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: The dtypes that admission lets in, by their names in safetensors and in torch.
_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class LoraFactors:
    """The delta s B A of one linear module: ``a`` (r, d_in), ``b`` (d_out, r), ``scale`` s."""

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

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((factors.rank for factors in self.modules.values()), default=0)

    @cached_property
    def size_bytes(self) -> int:
        """The memory that these tensors keep from being freed: their storages, each counted once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for factors in self.modules.values()
            for tensor in (factors.a, factors.b)
        }
        return sum(storages.values())


def factors_from_buffer(weights: mmap | bytearray, config: AdapterConfig, digest: str) -> AdapterFactors:
    """Factors of an admitted file's content, in the dtype they are stored in, as views into that memory.

    The memory lives as long as any of them, and must not be written to. Admission has checked the file; here is only
    what keeps other content, which its digest will give away, from being more than wrong numbers.

    Raises:
        Exception: of any kind, where the content is not what was admitted.
    """
    import torch

    start = 8 + int.from_bytes(weights[:8], "little")
    raw = torch.frombuffer(weights, dtype=torch.uint8)
    typed: dict[str, Tensor] = {}
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, spec in json.loads(weights[8:start]).items():
        if key == "__metadata__":
            continue
        match = FACTOR_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no factor")
        name = spec["dtype"]
        if name not in typed:
            typed[name] = _whole(raw, getattr(torch, _DTYPES[name]))
        sides[match["side"]][match["module"]] = _view(raw, typed[name], start + spec["data_offsets"][0], spec["shape"])
    if sides["A"].keys() != sides["B"].keys():
        raise ValueError("a module has only one of its factors")
    modules = {module: LoraFactors(a, sides["B"][module], config.scale(module)) for module, a in sides["A"].items()}
    for module, factors in modules.items():
        if factors.b.shape[1] != factors.rank:
            raise ValueError(f"the factors of {module!r} have different ranks")
    return AdapterFactors(digest, modules)


def _whole(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _view(raw: Tensor, typed: Tensor, start: int, shape: list[Any]) -> Tensor:
    """The matrix that begins at byte ``start``."""
    rows, columns = shape
    stop = start + rows * columns * typed.itemsize
    if not 0 <= start <= stop <= raw.numel():
        raise ValueError(f"a tensor of bytes {start} to {stop} in a file of {raw.numel()}")
    place, odd = divmod(start, typed.itemsize)
    if odd:
        # Writers that do not align their tensors are rare, and a copy is all that can be done.
        return raw[start:stop].clone().view(typed.dtype).view(rows, columns)
    return typed.as_strided((rows, columns), (columns, 1), place)
