"""Adapters that come and go in a real hub while nothing is trained: its answers stay those of a fresh evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from benchmarks._retriever_data import Material
from benchmarks._retriever_effort import Effort
from benchmarks._retriever_lab import KeptEncoder, Lab, say
from benchmarks._retriever_score import KS, Profiles, Row, Scores, Table, accuracy, pool_of, ranks, with_and_without
from benchmarks._retriever_tables import FRACTION, trained_runs, untrained_run
from benchmarks._retriever_wordings import Distractors
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.samples import sample_texts
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.testing import tiny_adapter, tiny_base

_K: Final = max(KS)
#: Two cosines that differ by less may come in either order: one product of matrices is not summed like another.
_SLACK: Final = 1e-5
_ARRIVING: Final = 0.55


def arrivals(lab: Lab, paper: Material, distractors: Distractors, effort: Effort) -> list[Table]:
    """The paper's adapters and as many others arrive, are retired, restored and removed, at random.

    ``differing`` counts the questions whose first 8 adapters are not those of a fresh evaluation of that pool.
    """
    runs = trained_runs(lab, paper, FRACTION, [0]) or untrained_run(lab)
    encoder, _ = runs[0]
    others = distractors.adapters(min(len(paper.tasks), distractors.most), 0)
    # As a registration keeps them.
    tasks = [*paper.tasks, *(replace(task, inputs=sample_texts(task.inputs, task.name)) for task in others)]
    rows: list[Row] = []
    with TemporaryDirectory(prefix="lora-hub-bench-") as temporary, _Life(Path(temporary), tasks, encoder) as life:
        life.start(len(tasks) // 3)
        for event in range(effort.events + 1):
            if event % effort.check_every == 0:
                say(f"arrivals: {event} of {effort.events} events")
                rows += [life.check(event, paper, rerank) for rerank in (False, True)]
            life.step()
    return [Table(f"Arrivals and departures, encoder {encoder.name}", rows)]


class _Life:
    """A hub, and what should be in it."""

    def __init__(self, folder: Path, tasks: Sequence[Task], encoder: KeptEncoder) -> None:
        base = tiny_base(folder / "base")
        self._adapter = tiny_adapter(folder / "adapter", base)
        self._hub = LoraHub(folder / "hub.db", index="exact", encoder=encoder, cache_dir=folder / "cache", offline=True)
        self._encoder = encoder
        self._tasks = {task.name: task for task in tasks}
        self._absent, self._retired, self._active = list(self._tasks), list[str](), list[str]()
        self._draw = random.Random(0)
        self._counts = {"registered": 0, "restored": 0, "retired": 0, "removed": 0}
        self._profiles = Profiles()

    def __enter__(self) -> _Life:
        return self

    def __exit__(self, *_: object) -> None:
        self._hub.close()

    def start(self, count: int) -> None:
        """Register some at once."""
        for _ in range(count):
            self._arrive()

    def step(self) -> None:
        """One arrives or leaves."""
        if self._draw.random() < _ARRIVING and (self._absent or self._retired):
            self._arrive()
        elif len(self._active) > 1:
            self._leave()

    def check(self, event: int, paper: Material, rerank: bool) -> Row:
        """Ask the hub the questions of all that is there, and compare with vectors and words made anew."""
        present = sorted(self._active)
        asked = [question for question in paper.clean if question.task in self._active]
        pool = pool_of(self._encoder, [self._tasks[name] for name in present], asked, self._profiles)
        scores = pool.scores(rerank)
        hits = self._hub.search_many([question.text for question in asked], _K, rerank=rerank)
        found = [[hit.adapter.name for hit in row] for row in hits]
        return {
            "event": event,
            **self._counts,
            "adapters": len(present),
            "questions": len(asked),
            **with_and_without(rerank),
            **_in_hub(found, [question.task for question in asked]),
            "top1 evaluated": accuracy(ranks(scores, pool.gold))["top1"],
            "differing": sum(_differs(row, present, own) for row, own in zip(found, scores, strict=True)),
        }

    def _arrive(self) -> None:
        waiting = [(name, kept) for kept in (self._absent, self._retired) for name in kept]
        name, kept = self._draw.choice(waiting)
        kept.remove(name)
        self._active.append(name)
        if kept is self._retired:
            self._hub.restore(name)
            self._counts["restored"] += 1
        else:
            self._hub.register(self._adapter, name=name, samples=self._tasks[name].inputs)
            self._counts["registered"] += 1

    def _leave(self) -> None:
        name = self._active.pop(self._draw.randrange(len(self._active)))
        if self._draw.random() < 0.5:
            self._hub.retire(name)
            self._retired.append(name)
            self._counts["retired"] += 1
        else:
            self._hub.remove(name)
            self._absent.append(name)
            self._counts["removed"] += 1


def _in_hub(found: Sequence[Sequence[str]], gold: Sequence[str]) -> Row:
    return {f"top{k}": 100 * float(np.mean([own in row[:k] for row, own in zip(found, gold, strict=True)])) for k in KS}


def _differs(found: Sequence[str], present: Sequence[str], scores: Scores) -> bool:
    """Whether the hub's answer is not the best one by these scores, but for what differs by less than rounding."""
    place = {name: number for number, name in enumerate(present)}
    if len(set(found)) != min(_K, len(present)):
        return True
    return not np.allclose(scores[[place[name] for name in found]], np.sort(scores)[::-1][: len(found)], atol=_SLACK)
