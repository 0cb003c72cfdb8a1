"""Searches of one registry through both indexes, through the bare indexes, and by numpy alone, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks._registry_data import BASES, Matrix, base_of, name_of, registration, tag_of, uniform
from lora_hub_sdk.registry.follower import _TIE_MARGIN
from lora_hub_sdk.registry.index import VectorIndex
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.types import DEFAULT_NAMESPACE, AdapterFilter

K: Final = 3
BATCHES: Final = (1, 32)
_FEWEST_CALLS: Final = 10
#: Seconds after which no more than ``_FEWEST_CALLS`` are made of one case.
_SECONDS: Final = 1.0
_WRITES: Final = 20
#: Medians of the ratios of two times that were taken one after the other, in one round.
_RATIOS: Final = (
    ("exact", "numpy"),
    ("chroma", "numpy"),
    ("chroma", "exact"),
    ("exact", "exact index"),
    ("chroma", "chroma index"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """n adapters in one database, opened once with each index: ``vectors`` (n, 384), ``namespaces`` one for each."""

    vectors: Matrix
    namespaces: Sequence[str]
    exact: Registry
    chroma: Registry


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A filter, and the places of the adapters that it lets through."""

    name: str
    allowed: AdapterFilter
    places: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one call; with fewer than 100 calls ``p99`` is the slowest."""

    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class SearchTimes:
    """One case with one size of batch. ``exact`` and ``chroma`` are what a caller pays, SQL and all; the others are the
    bare index for the same filter, and numpy over the allowed rows laid together beforehand."""

    case: str
    batch: int
    candidates: int
    calls: int
    systems: dict[str, Latency]
    ratios: dict[str, float]


def one_namespace_cases(pool: Pool, prompt: Matrix) -> list[Case]:
    """All adapters; then half, a tenth, and all but the three nearest to ``prompt`` (384,)."""
    places = np.arange(len(pool.vectors))
    nearest = np.argsort(-(pool.vectors @ prompt))[:K]
    of_base = np.array([base_of(place) == BASES[0] for place in range(len(places))])
    tagged = np.array([tag_of(place) == tag_of(3) for place in range(len(places))])
    return [
        Case("one namespace", AdapterFilter(), places),
        Case("base model, 50 %", AdapterFilter(base_model=BASES[0]), places[of_base]),
        Case("tag, 10 %", AdapterFilter(tags=(tag_of(3),)), places[tagged]),
        Case("3 names excluded", AdapterFilter(exclude=tuple(map(name_of, nearest))), np.delete(places, nearest)),
    ]


def namespace_case(pool: Pool) -> Case:
    """One namespace of several."""
    namespace = pool.namespaces[0]
    own = np.flatnonzero(np.array(pool.namespaces) == namespace)
    return Case(f"1 of {len(set(pool.namespaces))} namespaces", AdapterFilter(namespace), own)


def measure_search(pool: Pool, case: Case, prompts: Matrix, batch: int, calls: int) -> SearchTimes:
    """Call every system in turns with the same prompts, ``batch`` at a time; the first round warms up.

    Cases that take long get fewer than ``calls``.
    """
    rows = np.ascontiguousarray(pool.vectors[case.places])
    systems: dict[str, Callable[[list[Matrix]], object]] = {
        "exact": lambda queries: pool.exact.search(queries, K, case.allowed),
        "exact index": _bare(pool.exact, case.allowed),
        "chroma": lambda queries: pool.chroma.search(queries, K, case.allowed),
        "chroma index": _bare(pool.chroma, case.allowed),
        "numpy": lambda queries: nearest_places(rows, np.stack(queries)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    draw, start = np.random.default_rng(0), 0.0
    for call in range(calls + 1):
        queries = list(prompts[draw.integers(len(prompts), size=batch)])
        for name, search in systems.items():
            seconds[name].append(timed(partial(search, queries)))
        if call == 0:
            seconds, start = {name: [] for name in systems}, perf_counter()
        elif call >= _FEWEST_CALLS and perf_counter() - start > _SECONDS:
            break
    return SearchTimes(
        case=case.name,
        batch=batch,
        candidates=len(case.places),
        calls=len(seconds["numpy"]),
        systems={name: latency(taken) for name, taken in seconds.items()},
        ratios={f"{own} / {other}": _ratio(seconds, own, other) for own, other in _RATIOS},
    )


def measure_after_writes(pool: Pool) -> tuple[dict[str, Latency], float]:
    """The first search after a registration by each index, and registrations per second among all these adapters.

    Chroma's registry follows what the other one wrote, as another process would.
    """
    prompt = [pool.vectors[0]]
    kinds = {"exact": pool.exact, "chroma": pool.chroma}
    filters = {"": AdapterFilter(), ", tag": AdapterFilter(tags=(tag_of(3),))}
    first: dict[str, list[float]] = {f"{kind}{what}": [] for kind in kinds for what in filters}
    written: list[float] = []
    for write in range(_WRITES):
        what = list(filters)[write % len(filters)]
        row = registration(len(pool.vectors) + write, uniform(1, seed=1 + write)[0], DEFAULT_NAMESPACE)
        written.append(timed(partial(pool.exact.add, row)))
        for kind, registry in kinds.items():
            first[f"{kind}{what}"].append(timed(partial(registry.search, prompt, K, filters[what])))
    return {name: latency(taken) for name, taken in first.items()}, 1 / median(written)


def recall(pool: Pool, prompts: Matrix) -> float:
    """The share of the exact index's top 3 that Chroma finds, over all prompts."""
    found = [
        [{hit.adapter.name for hit in hits} for hits in registry.search(list(prompts), K, AdapterFilter())]
        for registry in (pool.exact, pool.chroma)
    ]
    return overlap(*found)


def overlap(wanted: Sequence[set[str]], found: Sequence[set[str]]) -> float:
    """Mean share of what was wanted that was found."""
    return float(np.mean([len(own & other) / len(own) for own, other in zip(wanted, found, strict=True)]))


def nearest_places(rows: Matrix, queries: Matrix) -> NDArray[np.intp]:
    """(queries, 3) places of the highest products, nearest first: the yardstick."""
    scores = queries @ rows.T
    k = min(K, len(rows))
    top = np.argpartition(scores, -k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = perf_counter()
    call()
    return perf_counter() - start


def latency(seconds: Sequence[float]) -> Latency:
    """Median and 99th percentile."""
    p50, p99 = np.percentile(seconds, (50, 99), method="higher") * 1000
    return Latency(float(p50), float(p99))


def bare_index(registry: Registry) -> VectorIndex:
    """The index within; whatever was written is in it."""
    registry.search([], K, AdapterFilter())
    return registry._follower._index


def _bare(registry: Registry, allowed: AdapterFilter) -> Callable[[list[Matrix]], object]:
    index, wanted = bare_index(registry), registry._follower._index_filter(allowed)
    return lambda queries: index.search(queries, K + _TIE_MARGIN, wanted)


def _ratio(seconds: Mapping[str, Sequence[float]], own: str, other: str) -> float:
    return median(mine / theirs for mine, theirs in zip(seconds[own], seconds[other], strict=True))
