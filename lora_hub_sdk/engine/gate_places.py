"""Where the ranks of a batch with gates lie in each form: who weighs them, and which are averaged by depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

from lora_hub_sdk.composition.expert_gate import ExpertGate

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
    from lora_hub_sdk.engine.forms import Form

_T = TypeVar("_T", int, float)


@dataclass(frozen=True)
class Gating:
    """The m rows that one gate weighs, of k members at most.

    Attributes:
        gate: its digest.
        places: their places in the batch; ``rows`` (m,) has the same.
        present: (m, k) where there are members.
        experts: (m, k) each member's place among the gate's experts; None where the gate has none.
        slot: (m, W) the member that each place's rank is of, k for none. Looked up (s,), counted through all m rows.
        at: looked up (s,) which of the S ranks these are.
    """

    gate: str
    places: tuple[int, ...]
    rows: Tensor
    present: Tensor
    experts: Tensor | None
    slot: Tensor
    at: Tensor | None = None


@dataclass(frozen=True)
class Fused:
    """The rows ``at`` (f,) whose ranks are averaged by depth: ``level`` (f, W), ``count`` of them.

    Looked up, ``at`` (s,) are ranks, and the levels (s,) count through all f rows.
    """

    at: Tensor
    level: Tensor
    count: int


@dataclass(frozen=True)
class Places:
    """W places for each of b rows, some of them empty. Looked up, S ranks: those of all rows one after the other.

    Attributes:
        ranks: the rows of the pool, (b, W); (W,) where all rows have the same; looked up (S,).
        shares: (b, W) or (S,) the weights of ranks that no gate weighs.
    """

    ranks: Tensor
    shares: Tensor
    gatings: tuple[Gating, ...]
    fused: Fused | None


def places_of(batch: BatchLora, form: Form) -> Places:
    """The places of a batch's ranks in the form "gather", "dense" or "lookup"."""
    if form == "lookup":
        return _looked_up(batch)
    rows = batch.rows
    if form == "dense":
        place_of = {rank: place for place, rank in enumerate(batch.different)}
        spread = [[place_of[rank] for rank in row.ranks] for row in rows]
        width, ranks = len(place_of), batch.index(batch.different)
    else:
        spread = [list(range(len(row.ranks))) for row in rows]
        width = max(map(len, spread))
        ranks = batch.index([_spread(row.ranks, at, width, 0) for row, at in zip(rows, spread, strict=True)])
    gatings = [
        Gating(
            gate,
            own,
            batch.index(own),
            present,
            experts,
            batch.index([_spread(rows[one].terms.owners, spread[one], width, present.shape[1]) for one in own]),
        )
        for gate, own, present, experts in _gated(batch)
    ]
    fused, levels = _fused(rows)
    level = batch.index([_spread(rows[one].terms.depths, spread[one], width, 0) for one in fused])
    shares = batch.numbers([_spread(_shares(row), at, width, 0.0) for row, at in zip(rows, spread, strict=True)])
    return Places(ranks, shares, tuple(gatings), Fused(batch.index(fused), level, levels) if fused else None)


def _looked_up(batch: BatchLora) -> Places:
    rows = batch.rows
    starts = list(accumulate((len(row.ranks) for row in rows), initial=0))
    spans = [range(start, end) for start, end in pairwise(starts)]

    def ranks_of(places: Sequence[int]) -> Tensor:
        return batch.index([rank for place in places for rank in spans[place]])

    def counted(values: Sequence[tuple[int, ...]], each: int) -> Tensor:
        return batch.index([at * each + value for at, own in enumerate(values) for value in own])

    gatings = [
        Gating(
            gate,
            own,
            batch.index(own),
            present,
            experts,
            counted([rows[place].terms.owners for place in own], present.shape[1]),
            ranks_of(own),
        )
        for gate, own, present, experts in _gated(batch)
    ]
    fused, levels = _fused(rows)
    level = counted([rows[place].terms.depths for place in fused], levels)
    return Places(
        batch.index([rank for row in rows for rank in row.ranks]),
        batch.numbers([share for row in rows for share in _shares(row)]),
        tuple(gatings),
        Fused(ranks_of(fused), level, levels * len(fused)) if fused else None,
    )


def _gated(batch: BatchLora) -> Iterator[tuple[str, tuple[int, ...], Tensor, Tensor | None]]:
    """For each gate its rows, where these have members, and which of the gate's experts they are."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(batch.rows):
        if row.gate is not None:
            found.setdefault(row.gate, []).append(place)
    for digest, own in found.items():
        gate, members = batch.gates[digest], [batch.rows[place].terms.digests for place in own]
        most = max(1, *map(len, members))
        present = batch.index([_spread([1] * len(row), range(len(row)), most, 0) for row in members]).bool()
        experts = None
        if isinstance(gate, ExpertGate):
            place_of = {expert: place for place, expert in enumerate(gate.experts.values())}
            experts = batch.index([_spread([place_of[one] for one in row], range(most), most, 0) for row in members])
        yield digest, tuple(own), present, experts


def _fused(rows: Sequence[RowLora]) -> tuple[list[int], int]:
    """Which rows average by depth, and how many depths there are."""
    found = [place for place, row in enumerate(rows) if row.terms.fused]
    return found, max((depth + 1 for place in found for depth in rows[place].terms.depths), default=1)


def _shares(row: RowLora) -> list[float]:
    return [row.terms.shares[owner] for owner in row.terms.owners]


def _spread(values: Sequence[_T], places: Sequence[int], width: int, empty: _T) -> list[_T]:
    found = [empty] * width
    for place, value in zip(places, values, strict=False):
        found[place] = value
    return found
