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

    ``gains`` and ``shifts`` are float32 (d_out,): they are summed over a route's members before they are rounded. So
    are ``norms``, by which a norm's parameters differ from the base's. ``saved`` are linear modules and embeddings.
    """

    gains: Mapping[str, Tensor]
    shifts: Mapping[str, Tensor]
    norms: Mapping[str, Mapping[str, Tensor]]
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
    whole = {path: own for path, own in factors.saved.items() if _is_whole(modules[path])}
    saved = {path: {name: one.to(device, dtype) for name, one in own.items()} for path, own in whole.items()}
    norms = {
        path: {name: one.to(device, torch.float32) - getattr(modules[path], name).float() for name, one in own.items()}
        for path, own in factors.saved.items()
        if path not in whole
    }
    kept = [one for parts in (*saved.values(), *norms.values()) for one in parts.values()]
    return Extras(
        own_gains,
        own_shifts,
        norms,
        {path: _replaced(modules[path], own) for path, own in saved.items()},
        sum(one.numel() * one.element_size() for one in (*own_gains.values(), *own_shifts.values(), *kept)),
    )


def norm_by_row(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What a norm gives x (b, ..., d) when its parameters differ from row to row: (b, d) each."""
    from torch import nn
    from torch.nn.functional import layer_norm, rms_norm

    rows = {name: one.view(len(one), *[1] * (x.dim() - 2), -1) for name, one in parameters.items()}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        # torch's own take one vector for all rows.
        if isinstance(module, nn.LayerNorm):
            plain = layer_norm(x, module.normalized_shape, None, None, module.eps)
        else:
            plain = rms_norm(x, module.normalized_shape, None, module.eps)
        scaled = plain * rows["weight"] if "weight" in rows else plain
        return scaled + rows["bias"] if "bias" in rows else scaled
    # transformers' multiply elementwise, each in its own way.
    return _with_parameters(module, rows)(x)


def _is_whole(module: nn.Module) -> bool:
    """Whether it is a module whose product is computed anew for the rows that replace it; else it is a norm."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D | nn.Embedding)


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
    return _with_parameters(module, parameters)


def _with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> Forward:
    """A copy that shares everything but these parameters, so that the base is never written."""
    from torch import nn

    clone: Any = copy.copy(module)
    clone.__dict__.pop("forward", None)
    clone._parameters = dict(clone._parameters)
    for name, tensor in parameters.items():
        clone._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return lambda x: clone(x)
