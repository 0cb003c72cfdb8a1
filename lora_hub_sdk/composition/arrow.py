"""Arrow's directions (arXiv 2405.11157, section 3.2): what each adapter reads most, from its factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors


def arrow_directions(experts: Sequence[AdapterFactors]) -> dict[str, Tensor]:
    """For each module that an expert adapts the top right singular vectors of s_i B_i A_i, (n, d_in), float32.

    Their largest entries are positive. An expert that does nothing at a module has zeros there.
    """
    import torch

    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for factors in experts for path in factors.modules):
        adapted = [factors.modules.get(path) for factors in experts]
        width = next(one.a.shape[1] for one in adapted if one is not None)
        nothing = torch.zeros(width)
        found[path] = torch.stack([nothing if one is None else _top(one).float().cpu() for one in adapted])
    return found


def _top(factors: LoraFactors) -> Tensor:
    """By the singular vectors of a matrix of r x r: the product of the factors is never made."""
    import torch

    rows: Tensor
    rows, upper_a = torch.linalg.qr(factors.a.double().T)
    upper_b = torch.linalg.qr(factors.b.double() * factors.scale, mode="r")[1]
    _, values, right = torch.linalg.svd(upper_b @ upper_a.T)
    if not values.any():
        return rows.new_zeros(len(rows))
    top: Tensor = rows @ right[0]
    return top * top[top.abs().argmax()].sign()
