"""How well an encoder tells adapters apart by their own samples alone: each sample searches, left out of its mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Samples that search; of more, as many are drawn.
_MOST_SEARCHES: Final = 5000


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Shares of ``searches`` samples whose own adapter came first, or among the first three or five; mean of 1/rank."""

    searches: int
    top_1: float
    top_3: float
    top_5: float
    mrr: float


def leave_one_out(
    vectors: Mapping[str, NDArray[np.float32]], searching: Collection[str] | None = None, *, seed: int = 0
) -> LeftOut | None:
    """Search with each sample for its adapter, whose mean is made of its other samples; among equals it counts as last.

    Args:
        vectors: for each adapter those of its samples, (n, d), of length 1.
        searching: adapters whose samples search; by default all. All of them are found.
        seed: of the draw where there are more than 5,000 samples.

    Returns:
        None where nobody can search: an adapter with one sample has no other to be found by.
    """
    names = list(vectors)
    place = {name: number for number, name in enumerate(names)}
    sums = np.stack([vectors[name].sum(axis=0, dtype=np.float64) for name in names])
    rows = [
        (place[name], row)
        for name in (names if searching is None else searching)
        if len(vectors[name]) > 1
        for row in vectors[name].astype(np.float64)
    ]
    if not rows:
        return None
    if len(rows) > _MOST_SEARCHES:
        drawn = np.random.default_rng(seed).choice(len(rows), _MOST_SEARCHES, replace=False)
        rows = [rows[number] for number in sorted(drawn)]
    means = _units(sums)
    ranks = np.empty(len(rows))
    for number, (own, sample) in enumerate(rows):
        scores = means @ sample
        scores[own] = _units((sums[own] - sample)[None])[0] @ sample
        # A little slack: rounding shall not decide between two adapters of the same samples.
        ranks[number] = np.count_nonzero(scores >= scores[own] - 1e-7)
    first, three, five = (float(np.mean(ranks <= k)) for k in (1, 3, 5))
    return LeftOut(len(rows), first, three, five, float(np.mean(1 / ranks)))


def _units(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float64] = rows / np.maximum(lengths, 1e-12)
    return units
