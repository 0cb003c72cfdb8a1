"""One adapter's factors as tensors: views into the content of its safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from mmap import mmap
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.registry.adapter_config import AdapterConfig, Init
from lora_hub_sdk.registry.tensor_keys import FACTOR_PARTS, place_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: The name, among a module's saved parameters, of a copy of the base's own weight: see ``AdapterFactors.saved``.
BASE_COPY: Final = "base_layer.weight"
#: The dtypes that admission lets in, by their names in safetensors and in torch.
_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class LoraFactors:
    """What an adapter does at one module: y = g * W x + bias + s B A x + shift.

    ``a`` is (r, d_in), ``b`` (d_out, r), ``scale`` s; of an embedding d_in is the vocabulary, x one-hot. ``gain`` g and
    ``shift`` (d_out,) are None where they are 1 and 0. Where there is a gain, ``b`` has it too: one adapter is a plain
    LoRA beside a gain. ``magnitude`` (d_out,) is DoRA's as stored; fitting it to a base makes a gain of it.
    """

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None
    shift: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterFactors:
    """All modules of one adapter. ``digest`` is the content that they were read from.

    ``saved`` holds the parameters by which the adapter replaces a module's own, by module path and name (PEFT's
    modules_to_save and trained biases); those that it does not name stay the base's. ``BASE_COPY`` among the names is
    the weight of the base that the adapter was trained on, stored beside it. An ``init`` other than "plain" took a part
    of the base's weights away before training. Fitting the adapter to a base accounts for both.
    """

    digest: str
    modules: Mapping[str, LoraFactors]
    saved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    init: Init = "plain"
    #: Whether its factors were completed by a part of the base's weights: their product is certain, their signs not.
    converted: bool = False

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((factors.rank for factors in self.modules.values()), default=0)

    @cached_property
    def size_bytes(self) -> int:
        """The memory that these tensors keep from being freed: their storages, each counted once."""
        storages = {}
        for tensor in self.tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of it."""
        for one in self.modules.values():
            yield one.a
            yield one.b
            yield from (extra for extra in (one.gain, one.shift, one.magnitude) if extra is not None)
        for parameters in self.saved.values():
            yield from parameters.values()


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
    found: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, spec in json.loads(weights[8:start]).items():
        if key == "__metadata__":
            continue
        path, part = place_of(key)
        name = spec["dtype"]
        if name not in typed:
            typed[name] = _whole(raw, getattr(torch, _DTYPES[name]))
        tensor = _view(raw, typed[name], start + spec["data_offsets"][0], spec["shape"])
        if part in FACTOR_PARTS:
            found.setdefault(path, {})[FACTOR_PARTS[part]] = tensor
        else:
            # The base's own weight is stored under two names; whatever was trained has only one.
            copied = part == BASE_COPY or (part == "weight" and not config.saves(path))
            saved.setdefault(path, {})[BASE_COPY if copied else part.removeprefix("base_layer.")] = tensor
    modules = {path: _module(path, parts, config.scale(path)) for path, parts in found.items()}
    return AdapterFactors(digest, modules, saved, config.init)


def _module(path: str, parts: Mapping[str, Tensor], scale: float) -> LoraFactors:
    a, b = parts["A"], parts["B"]
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"the factors of {path!r} have different ranks")
    bias = parts.get("bias")
    return LoraFactors(
        a, b, scale, shift=None if bias is None else scale * bias.float(), magnitude=parts.get("magnitude")
    )


def _whole(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _view(raw: Tensor, typed: Tensor, start: int, shape: list[int]) -> Tensor:
    """The matrix or vector that begins at byte ``start``."""
    stop = start + math.prod(shape) * typed.itemsize
    if not (len(shape) in (1, 2) and 0 <= start <= stop <= raw.numel()):
        raise ValueError(f"a tensor of shape {shape}, bytes {start} to {stop}, in a file of {raw.numel()}")
    place, odd = divmod(start, typed.itemsize)
    if odd:
        # Writers that do not align their tensors are rare, and a copy is all that can be done.
        return raw[start:stop].clone().view(typed.dtype).view(shape)
    return typed.as_strided(shape, (shape[1], 1) if len(shape) == 2 else (1,), place)
