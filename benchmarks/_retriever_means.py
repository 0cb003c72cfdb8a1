"""What represents an adapter better than the plain mean of its samples: tried, with what each way costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import process_time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks._retriever_data import Material
from benchmarks._retriever_effort import Effort
from benchmarks._retriever_lab import Lab
from benchmarks._retriever_score import Pool, Profiles, Ranks, Row, Scores, Table, accuracy, over, pool_of, ranks
from benchmarks._retriever_tables import FRACTION, Run, trained_runs
from lora_hub_sdk.retriever.tasks import split_tasks

Wide = NDArray[np.float64]
_SHRINK: Final = (0.1, 0.4, 0.7)
_SHARPNESS: Final = 5.0
_WORDS: Final = r"\w+|[^\w\s]"


@dataclass(frozen=True, slots=True)
class Given:
    """What a way may use: each adapter's sample vectors, the prompts', and which adapters' tasks were trained on."""

    pool: Pool
    samples: Sequence[Wide]
    prompts: Wide
    trained: Sequence[int]


@dataclass(frozen=True, slots=True)
class Way:
    """``make`` does what registration does and gives the search, which gives (prompts, adapters) scores.

    ``vectors``: how many an adapter needs.
    """

    make: Callable[[Given], Callable[[], Scores]]
    vectors: float


def means(lab: Lab, paper: Material, effort: Effort) -> list[Table]:
    """Unseen tasks' questions, over the splits; whitening is fitted on the trained tasks of each split alone.

    Milliseconds of processor time are of one prompt of a batch among the paper's 48 adapters, its encoding not counted.
    """
    profiles = Profiles()
    ways = _ways(float(np.mean([len(task.inputs) for task in paper.tasks])))
    tables = []
    for title, trained in (("untrained", False), ("trained on 40 %", True)):
        runs = trained_runs(lab, paper, FRACTION, range(effort.splits)) if trained else _untrained(lab, paper, effort)
        found: dict[str, list[Row]] = {}
        for encoder, seen in runs:
            given = _given(pool_of(encoder, paper.tasks, paper.clean, profiles), encoder.encode, seen)
            mask = ~given.pool.asks(set(seen))
            for name, way in ways.items():
                places, taken = _timed(way, given)
                found.setdefault(name, []).append({**accuracy(places[mask]), "ms a prompt": taken})
        if found:
            tables.append(Table(f"Representations, encoder {title}", _compared(found, ways)))
    return tables


def _compared(found: Mapping[str, list[Row]], ways: Mapping[str, Way]) -> list[Row]:
    plain = float(np.mean([row["top1"] for row in found["plain mean"]]))
    rows: list[Row] = []
    for name, several in found.items():
        gained = float(np.mean([row["top1"] for row in several])) - plain
        cost = {"ms a prompt": min(row["ms a prompt"] for row in several), "vectors": ways[name].vectors}
        rows.append({"way": name, **over(several), "top1 gained": gained, **cost})
    return rows


def _untrained(lab: Lab, paper: Material, effort: Effort) -> list[Run]:
    """The same splits, so that both tables are of the same questions, and whitening sees the same tasks."""
    splits = [split_tasks(paper.tasks, FRACTION, seed)[0] for seed in range(effort.splits)]
    return [(lab.untrained(), frozenset(task.name for task in seen)) for seen in splits]


def _given(pool: Pool, encode: Callable[[Sequence[str]], Any], seen: frozenset[str]) -> Given:
    samples = [np.asarray(encode(task.inputs), dtype=np.float64) for task in pool.tasks]
    trained = [place for place, task in enumerate(pool.tasks) if task.name in seen]
    return Given(pool, samples, pool.prompts.astype(np.float64), trained)


def _timed(way: Way, given: Given) -> tuple[Ranks, float]:
    search = way.make(given)
    search()
    start = process_time()
    scores = search()
    taken = process_time() - start
    return ranks(scores, given.pool.gold), 1000 * taken / len(given.prompts)


def _ways(samples: float) -> dict[str, Way]:
    return {
        "plain mean": Way(lambda given: _nearest(given.prompts, _means(given)), 1),
        "mean not brought to length 1": Way(
            lambda given: _dot(given.prompts, np.stack([rows.mean(0) for rows in given.samples])), 1
        ),
        **{f"{k} prototypes, nearest": Way(_prototypes(k), k) for k in (2, 3, 4)},
        "nearest sample": Way(lambda given: _best(given, given.samples, 1), samples),
        "3 nearest samples": Way(lambda given: _best(given, given.samples, 3), samples),
        "mean less the pool's mean": Way(_centred, 1),
        **{f"whitened within adapters, shrunk {shrink}": Way(_whitened(shrink), 1) for shrink in _SHRINK},
        "samples near the mean weigh more": Way(_weighted, 1),
        "without the farthest fifth": Way(_trimmed, 1),
        "medoid": Way(_medoid, 1),
        "words alone (tf-idf, 1-3-grams)": Way(_words, 0),
        "plain mean, reranked by words": Way(lambda given: lambda: given.pool.reranked(), 1),
        f"whitened, shrunk {_SHRINK[1]}, reranked": Way(_whitened_reranked(_SHRINK[1]), 1),
    }


def _means(given: Given) -> Wide:
    return _units(np.stack([rows.mean(axis=0) for rows in given.samples]))


def _units(rows: Wide) -> Wide:
    lengths: Wide = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(lengths, 1e-12)


def _dot(prompts: Wide, adapters: Wide) -> Callable[[], Scores]:
    return lambda: prompts @ adapters.T


def _nearest(prompts: Wide, adapters: Wide) -> Callable[[], Scores]:
    return _dot(_units(prompts), _units(adapters))


def _best(given: Given, vectors: Sequence[Wide], count: int) -> Callable[[], Scores]:
    """The mean of the ``count`` best cosines with an adapter's vectors."""
    every = np.concatenate(vectors)
    ends = np.cumsum([len(rows) for rows in vectors])[:-1]

    def search() -> Scores:
        parts = np.split(given.prompts @ every.T, ends, axis=1)
        return np.stack([np.sort(part, axis=1)[:, -count:].mean(axis=1) for part in parts], axis=1)

    return search


def _prototypes(count: int) -> Callable[[Given], Callable[[], Scores]]:
    def make(given: Given) -> Callable[[], Scores]:
        from sklearn.cluster import KMeans

        centres = []
        for rows in given.samples:
            fitted = KMeans(min(count, len(rows)), n_init=4, random_state=0).fit(rows)
            centres.append(_units(fitted.cluster_centers_))
        return _best(given, centres, 1)

    return make


def _centred(given: Given) -> Callable[[], Scores]:
    adapters = _means(given)
    middle = adapters.mean(axis=0)
    return lambda: _units(given.prompts - middle) @ _units(adapters - middle).T


def _whitening(given: Given, shrink: float) -> Wide:
    """The inverse root of the covariance of samples around their adapter's mean, shrunk to a multiple of identity."""
    away = np.concatenate([given.samples[place] - given.samples[place].mean(axis=0) for place in given.trained])
    covariance = away.T @ away / len(away)
    width = len(covariance)
    covariance = (1 - shrink) * covariance + shrink * np.trace(covariance) / width * np.eye(width)
    values, vectors = np.linalg.eigh(covariance)
    whitening: Wide = vectors @ np.diag(values**-0.5) @ vectors.T
    return whitening


def _whitened(shrink: float) -> Callable[[Given], Callable[[], Scores]]:
    def make(given: Given) -> Callable[[], Scores]:
        turn = _whitening(given, shrink)
        adapters = _units(np.stack([_units(rows @ turn).mean(axis=0) for rows in given.samples]))
        return lambda: _units(given.prompts @ turn) @ adapters.T

    return make


def _whitened_reranked(shrink: float) -> Callable[[Given], Callable[[], Scores]]:
    def make(given: Given) -> Callable[[], Scores]:
        search = _whitened(shrink)(given)
        return lambda: given.pool.reranked(search())

    return make


def _weighted(given: Given) -> Callable[[], Scores]:
    adapters = []
    for rows, mean in zip(given.samples, _means(given), strict=True):
        weights = np.exp(_SHARPNESS * (rows @ mean))
        adapters.append(weights @ rows)
    return _nearest(given.prompts, np.stack(adapters))


def _trimmed(given: Given) -> Callable[[], Scores]:
    adapters = []
    for rows, mean in zip(given.samples, _means(given), strict=True):
        kept = np.argsort(rows @ mean)[len(rows) // 5 :]
        adapters.append(rows[kept].mean(axis=0))
    return _nearest(given.prompts, np.stack(adapters))


def _medoid(given: Given) -> Callable[[], Scores]:
    chosen = [rows[(rows @ rows.T).sum(axis=1).argmax()] for rows in given.samples]
    return _nearest(given.prompts, np.stack(chosen))


def _words(given: Given) -> Callable[[], Scores]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    tasks = given.pool.tasks
    vectorizer = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True, token_pattern=_WORDS)
    counted = vectorizer.fit_transform([text for task in tasks for text in task.inputs])
    ends = np.cumsum([0, *(len(task.inputs) for task in tasks)])
    adapters = _units(np.stack([np.asarray(counted[a:b].mean(axis=0))[0] for a, b in pairwise(ends)]))
    texts = [question.text for question in given.pool.questions]
    return lambda: np.asarray(vectorizer.transform(texts) @ adapters.T)
