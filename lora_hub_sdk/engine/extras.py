"""What an adapter has beside low-rank factors, on the model's device: gains, shifts, and modules of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_hub_sdk.composition.factors import AdapterFactors

#: x -> output of a module, both as the base's own module has them.
Forward = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Extras:
    """By module path: what the base's product is multiplied by less 1, what is added, and what replaces the module.

    ``gains`` and ``shifts`` are float32 (d_out,): they are summed over a route's members before they are rounded.
    """

    gains: Mapping[str, Tensor]
    shifts: Mapping[str, Tensor]
    saved: Mapping[str, Forward]
    size_bytes: int


def extras_of(
    factors: AdapterFactors, modules: Mapping[str, nn.Module], *, dtype: torch.dtype, device: torch.device
) -> Extras | None:
    """The extras of an adapter that is fitted to the base; None where it has factors alone."""
    gains = {path: one.gain for path, one in factors.modules.items() if one.gain is not None}
    shifts = {path: one.shift for path, one in factors.modules.items() if one.shift is not None}
    if not (gains or shifts or factors.saved):
        return None
    import torch

    own_gains = {path: gain.to(device, torch.float32) - 1 for path, gain in gains.items()}
    own_shifts = {path: shift.to(device, torch.float32) for path, shift in shifts.items()}
    # Norms may be kept in a wider dtype than the rest of the model.
    saved = {
        path: {name: tensor.to(device, _dtype_of(modules[path], name, dtype)) for name, tensor in own.items()}
        for path, own in factors.saved.items()
    }
    tensors = [*own_gains.values(), *own_shifts.values(), *(one for own in saved.values() for one in own.values())]
    return Extras(
        own_gains,
        own_shifts,
        {path: _replaced(modules[path], own) for path, own in saved.items()},
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def _dtype_of(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    own: Any = getattr(module, name, None)
    return own.dtype if own is not None and own.dtype.is_floating_point else dtype


def _replaced(module: nn.Module, parameters: Mapping[str, Tensor]) -> Forward:
    """The module's forward with these parameters instead of its own; what is not among them stays the base's."""
    from torch import nn
    from torch.nn.functional import linear
    from transformers.pytorch_utils import Conv1D

    own: Any = module
    if isinstance(module, nn.Linear | Conv1D) and "weight" in parameters:
        # A quantized module multiplies by weights that these are not.
        weight = parameters["weight"]
        if isinstance(module, Conv1D):
            weight = weight.t()
        return partial(linear, weight=weight, bias=parameters.get("bias", own.bias))
    # A copy that shares everything but these parameters, so that the base is never written.
    clone: Any = copy.copy(module)
    clone.__dict__.pop("forward", None)
    clone._parameters = dict(own._parameters)
    for name, tensor in parameters.items():
        clone._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return lambda x: clone(x)
