"""Every static route is exactly one LoRA per row; this builds it once, before decoding starts.

mixture:  A = rows [A_i], B = columns [w_i s_i B_i]      rank sum(r_i)
fusion:   A = sum w_i A_i, B = sum w_i s_i B_i           rank max(r_i), zero-padded
A module that an adapter lacks contributes zero. Sums are taken in float32 and cast to the model's dtype at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.composition.mapping import distinct_rows
from lora_hub_sdk.types import Averaged, Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class RowLora:
    """One module of a composed batch: ``a`` (u, R, d_in) and ``b`` (u, d_out, R), scaling already inside b.

    u is the number of rows, or 1 where all rows share one composition.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class ComposedBatch:
    """What the layers need for one batch of ``rows`` prompts: a ``RowLora`` for each module that any adapter has."""

    rows: int
    modules: Mapping[str, RowLora]

    def select(self, keep: Tensor) -> ComposedBatch:
        """The batch reduced to the rows at the indices ``keep``, for when others have finished."""
        return ComposedBatch(
            len(keep),
            {
                path: lora if lora.a.shape[0] == 1 else RowLora(lora.a[keep], lora.b[keep])
                for path, lora in self.modules.items()
            },
        )


def compose(
    plan: Plan, adapters: Sequence[AdapterFactors], *, dtype: torch.dtype, device: torch.device | str
) -> ComposedBatch:
    """One LoRA per row from a plan and its adapters' factors, ``adapters[j]`` belonging to column j of M."""
    import torch

    firsts, places = distinct_rows(plan)
    used = sorted({path for adapter in adapters for path in adapter.modules})
    index = torch.tensor(places)
    modules = {}
    for path in used:
        present = {j: adapter.modules[path] for j, adapter in enumerate(adapters) if path in adapter.modules}
        built = [_compose_row(plan.matrix[row], plan.averaged[row], present) for row in firsts]
        a, b = _stack(built)
        if len(firsts) > 1:
            a, b = a[index], b[index]
        modules[path] = RowLora(a.to(device, dtype), b.to(device, dtype))
    return ComposedBatch(len(plan.matrix), modules)


def _compose_row(
    weights: Sequence[float], averaged: Averaged, present: Mapping[int, LoraFactors]
) -> tuple[Tensor, Tensor]:
    """(R, d_in) and (d_out, R) in float32 for one row of M."""
    import torch

    chosen = [(weights[j], factors) for j, factors in present.items() if weights[j] != 0.0]
    if not chosen:
        any_factors = next(iter(present.values()))
        return any_factors.a.new_zeros(0, any_factors.a.shape[1], dtype=torch.float32), (
            any_factors.b.new_zeros(any_factors.b.shape[0], 0, dtype=torch.float32)
        )
    if averaged == "outputs":
        a = torch.cat([factors.a.float() for _, factors in chosen])
        b = torch.cat([factors.b.float() * (weight * factors.scale) for weight, factors in chosen], dim=1)
        return a, b
    rank = max(factors.rank for _, factors in chosen)
    first = chosen[0][1]
    a = torch.zeros(rank, first.a.shape[1])
    b = torch.zeros(first.b.shape[0], rank)
    for weight, factors in chosen:
        a[: factors.rank] += factors.a.float() * weight
        b[:, : factors.rank] += factors.b.float() * (weight * factors.scale)
    return a, b


def _stack(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows of differing rank as one (u, R, d_in) and one (u, d_out, R), zero-padded to the largest R."""
    rank = max(a.shape[0] for a, _ in rows)
    a_out = rows[0][0].new_zeros(len(rows), rank, rows[0][0].shape[1])
    b_out = rows[0][1].new_zeros(len(rows), rows[0][1].shape[0], rank)
    for place, (a, b) in enumerate(rows):
        a_out[place, : a.shape[0]] = a
        b_out[place, :, : b.shape[1]] = b
    return a_out, b_out
