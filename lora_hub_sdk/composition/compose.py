"""Every static route is exactly one LoRA per row; this builds it once, before decoding starts.

mixture:  A = rows [A_i], B = columns [w_i s_i B_i]      rank sum(r_i)
fusion:   A = sum w_i A_i, B = sum w_i s_i B_i           rank max(r_i), zero-padded
A module that an adapter lacks contributes zero. Sums are taken in float32 and cast to the model's dtype at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.composition.mapping import is_shared
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
    """What the layers need for one batch: a ``RowLora`` for each module that any adapter has.

    ``decoding`` are the factors for steps of one token, where another dtype is faster than in ``modules``.
    """

    modules: Mapping[str, RowLora]
    decoding: Mapping[str, RowLora] | None = None

    def for_decoding(self) -> ComposedBatch:
        """The batch once its prompts are behind it; the factors that only they needed can be released."""
        return self if self.decoding is None else ComposedBatch(self.decoding)

    def select(self, keep: Tensor) -> ComposedBatch:
        """The batch reduced to the rows at the indices ``keep``, for when others have finished."""
        return ComposedBatch(
            {
                path: lora if lora.a.shape[0] == 1 else RowLora(lora.a[keep], lora.b[keep])
                for path, lora in self.modules.items()
            }
        )


def compose(
    plan: Plan, adapters: Sequence[AdapterFactors], *, dtype: torch.dtype, device: torch.device | str
) -> ComposedBatch:
    """One LoRA per row from a plan and its adapters' factors, ``adapters[j]`` belonging to column j of M."""
    import torch

    rows = range(1) if is_shared(plan) else range(len(plan.matrix))
    layouts: dict[tuple[tuple[int, int], ...], _Terms] = {}
    exact: dict[str, RowLora] = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        present = {column: adapter.modules[path] for column, adapter in enumerate(adapters) if path in adapter.modules}
        # Most modules of a batch have the same adapters at the same ranks, and so the same terms.
        layout = tuple((column, factors.rank) for column, factors in present.items())
        if layout not in layouts:
            layouts[layout] = _terms(plan, rows, dict(layout))
        if layouts[layout].index.numel():
            exact[path] = _gather(layouts[layout], list(present.values()))
    cast = {path: RowLora(lora.a.to(device, dtype), lora.b.to(device, dtype)) for path, lora in exact.items()}
    # On a CPU the product of one half-precision token with its own row's factors takes twice as long as in float32.
    faster = torch.device(device).type == "cpu" and dtype != torch.float32
    return ComposedBatch(cast, exact if faster else None)


@dataclass(frozen=True)
class _Terms:
    """Which of the T stacked ranks of a module's adapters make up rank r of each row's LoRA, and with which weights.

    All are (u, R, J): J is 1 in a mixture, where every rank is one adapter's, and up to p in a fusion, where a rank is
    a sum over adapters. ``weights_a`` is None where no row is a fusion, so that every rank of A is taken as it is.
    """

    index: Tensor
    weights_a: Tensor | None
    weights_b: Tensor


def _terms(plan: Plan, rows: Sequence[int], ranks: Mapping[int, int]) -> _Terms:
    import torch

    starts = dict(zip(ranks, accumulate(ranks.values(), initial=0), strict=False))
    listed = [_row_terms(plan.matrix[row], plan.averaged[row], ranks, starts) for row in rows]
    depth = max(map(len, listed))
    width = max((len(sums) for row in listed for sums in row), default=0)
    nothing = (0, 0.0, 0.0)  # a stacked rank that exists, with no weight
    padded = [
        [[*sums, *[nothing] * (width - len(sums))] for sums in (*row, *[[]] * (depth - len(row)))] for row in listed
    ]
    table = torch.tensor(padded, dtype=torch.float64).reshape(len(rows), depth, width, 3)
    fused = any(plan.averaged[row] == "parameters" for row in rows)
    return _Terms(table[..., 0].long(), table[..., 1].float() if fused else None, table[..., 2].float())


def _row_terms(
    weights: Sequence[float], averaged: Averaged, ranks: Mapping[int, int], starts: Mapping[int, int]
) -> list[list[tuple[int, float, float]]]:
    """For each rank of one row's LoRA its terms: (stacked rank, weight in A, weight in B)."""
    chosen = [column for column in ranks if weights[column] != 0.0]
    if averaged == "outputs":
        return [[(starts[column] + rank, 1.0, weights[column])] for column in chosen for rank in range(ranks[column])]
    deepest = max((ranks[column] for column in chosen), default=0)
    return [
        [(starts[column] + rank, weights[column], weights[column]) for column in chosen if rank < ranks[column]]
        for rank in range(deepest)
    ]


def _gather(terms: _Terms, present: Sequence[LoraFactors]) -> RowLora:
    import torch

    stacked_a = torch.cat([factors.a.float() for factors in present])
    stacked_b = torch.cat([factors.b.t().float() * factors.scale for factors in present])
    b = (stacked_b[terms.index] * terms.weights_b[..., None]).sum(2)
    if terms.weights_a is None:
        # Padding has no weight in B, so what it is in A does not matter.
        return RowLora(stacked_a[terms.index[..., 0]], b.transpose(1, 2))
    a = (stacked_a[terms.index] * terms.weights_a[..., None]).sum(2)
    return RowLora(a, b.transpose(1, 2))
