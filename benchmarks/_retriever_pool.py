"""What is left of the accuracy when the pool grows from the paper's 48 adapters to 10,000."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from benchmarks._retriever_data import Material
from benchmarks._retriever_effort import Effort
from benchmarks._retriever_lab import Lab, Matrix, say
from benchmarks._retriever_score import (
    Mask,
    Pool,
    Profiles,
    Row,
    Scores,
    Table,
    accuracy,
    adapter_vectors,
    over,
    pool_of,
    ranks,
    with_and_without,
)
from benchmarks._retriever_tables import FRACTION, Run, trained_runs, untrained_run
from benchmarks._retriever_wordings import Distractors, shared_texts, source_of
from lora_hub_sdk.retriever.encoder import Encoder
from lora_hub_sdk.retriever.tasks import Task

#: Adapters whose samples are looked up at a time, which bounds the memory.
_AT_ONCE: Final = 500


def pools(lab: Lab, paper: Material, distractors: Distractors, effort: Effort) -> list[Table]:
    """The paper's questions among its adapters and made-up ones; each draw takes other made-up ones.

    Half of the paper's tasks have made-up adapters of the same source, in other wordings. To find one of these is an
    error of ``top1``, and none of ``same task``, which would answer as well. The made-up lie nearer to each other than
    the paper's do, so a real pool of that size is rather easier.
    """
    runs: dict[str, list[Run]] = {
        f"{lab.baseline}, untrained": untrained_run(lab),
        "trained on 40 %, first split": trained_runs(lab, paper, FRACTION, [0]),
    }
    rows: list[Row] = []
    alike: list[Row] = []
    profiles = Profiles()
    sizes = [size for size in effort.pool_sizes if size - len(paper.tasks) <= distractors.most]
    made = [distractors.adapters(max(sizes) - len(paper.tasks), draw) for draw in range(effort.pool_draws)]
    for name, several in runs.items():
        for encoder, seen in several:
            own = pool_of(encoder, paper.tasks, paper.clean, profiles)
            encoder.encode(distractors.all_texts)
            grown = [_grown(own, drawn, encoder) for drawn in made]
            alike.append({"encoder": name, **_likeness(own, grown[0])})
            for size in sizes:
                say(f"{name}: {size} adapters")
                part = [_first(pool, size) for pool in grown]
                for rerank in (False, True):
                    scored = [(pool, pool.scores(rerank)) for pool in (part[:1] if size == len(own.tasks) else part)]
                    for group in ("all", "unseen") if seen else ("all",):
                        mask = ~own.asks(set(seen) if group == "unseen" else set())
                        found = over([_found(pool, scores, mask) for pool, scores in scored])
                        which = {"adapters": size, "encoder": name, "questions of": group}
                        rows.append({**which, **with_and_without(rerank), **found})
    kept = 100 * shared_texts(made[0])
    return [
        Table(
            "By the size of the pool",
            rows,
            f"made-up adapters draw 20 of {len(distractors.all_texts)} reworded texts, two or three wordings of one "
            f"task each; two of one task share {kept:.0f} % of their texts on average, none shares all",
        ),
        Table("How alike the adapters of a pool are: cosine of each to its nearest other, median", alike),
    ]


def _grown(own: Pool, drawn: Sequence[Task], encoder: Encoder) -> Pool:
    parts = (drawn[start : start + _AT_ONCE] for start in range(0, len(drawn), _AT_ONCE))
    vectors = np.concatenate([own.vectors, *(adapter_vectors(encoder, part) for part in parts)])
    return replace(own, tasks=[*own.tasks, *drawn], vectors=vectors)


def _first(pool: Pool, size: int) -> Pool:
    return replace(pool, tasks=pool.tasks[:size], vectors=pool.vectors[:size])


def _found(pool: Pool, scores: Scores, mask: Mask) -> Row:
    first = scores.argmax(axis=1)
    sources = np.array([source_of(task.name) for task in pool.tasks])
    same = sources[first] == sources[pool.gold]
    domain = pool.domains[first] == pool.domains[pool.gold]
    return {
        **accuracy(ranks(scores, pool.gold)[mask]),
        "same task": 100 * float(np.mean(same[mask])),
        "domain": 100 * float(np.mean(domain[mask])),
    }


def _likeness(own: Pool, grown: Pool) -> Row:
    made = grown.vectors[len(own.vectors) :][:_AT_ONCE]
    return {
        "the paper's, to each other": _nearest(own.vectors),
        "made-up, to each other": _nearest(made),
        "the paper's, to the made-up": float(np.median((own.vectors @ made.T).max(axis=1))) if len(made) else 0.0,
    }


def _nearest(vectors: Matrix) -> float:
    if len(vectors) < 2:
        return 0.0
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    return float(np.median(cosines.max(axis=1)))
