"""From vectors to ranks and accuracies: how often the right adapter is among the first k. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks._retriever_lab import Matrix
from lora_hub_sdk.retriever.encoder import Encoder, mean_vector
from lora_hub_sdk.retriever.lexicon import Profile, grams, profile
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.reranker import CANDIDATES, relevance
from lora_hub_sdk.retriever.tasks import Task

KS: Final = (1, 3, 5, 8)
Scores = NDArray[np.float64]
Ranks = NDArray[np.int64]
Mask = NDArray[np.bool_]
Row = dict[str, Any]
#: Digits at which two cosines are one, as ``evaluate_retriever`` takes them.
_DIGITS: Final = 6
#: More than any cosine or relevance can be: what was not reranked comes after what was.
_FAR: Final = 1e3


@dataclass(frozen=True, slots=True)
class Table:
    """What is shown together. A cell that is a mapping has a value, and what it lies between."""

    title: str
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Pool:
    """Adapters and the questions put to them; ``vectors`` (adapters, d) and ``prompts`` (questions, d) of length 1."""

    tasks: Sequence[Task]
    questions: Sequence[Question]
    vectors: Matrix
    prompts: Matrix
    profiles: Profiles = field(default_factory=lambda: Profiles())

    @property
    def gold(self) -> NDArray[np.int64]:
        """(questions,) the place of the adapter that each should find."""
        places = {task.name: place for place, task in enumerate(self.tasks)}
        return np.array([places[asked.task] for asked in self.questions])

    @property
    def domains(self) -> NDArray[np.str_]:
        """(adapters,) of each its domain."""
        return np.array([task.domain or "" for task in self.tasks])

    def asks(self, names: set[str]) -> Mask:
        """(questions,) which ask for one of these tasks."""
        return np.array([asked.task in names for asked in self.questions], dtype=bool)

    def cosines(self) -> Scores:
        """(questions, adapters)."""
        return np.asarray(np.round(self.prompts @ self.vectors.T, _DIGITS), dtype=np.float64)

    def reranked(self, scores: Scores | None = None) -> Scores:
        """As ``scores``, by default the cosines, but for the nearest of each question, which words put in order."""
        scores = self.cosines() if scores is None else scores
        count = min(CANDIDATES, len(self.tasks))
        nearest = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        ordered = scores - _FAR
        for row, (asked, places) in enumerate(zip(self.questions, nearest, strict=True)):
            words = [self.profiles.of(self.tasks[place]) for place in places]
            ordered[row, places] = _FAR + relevance(scores[row, places], grams(asked.text), words)
        return ordered

    def scores(self, rerank: bool) -> Scores:
        """What the adapters of each question are ordered by."""
        return self.reranked() if rerank else self.cosines()


class Profiles:
    """The words of adapters, made when they are first needed."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, ...], Profile | None] = {}

    def of(self, task: Task) -> Profile | None:
        """Of one adapter."""
        if task.inputs not in self._made:
            self._made[task.inputs] = profile(task.inputs)
        return self._made[task.inputs]


def pool_of(
    encoder: Encoder, tasks: Sequence[Task], questions: Sequence[Question], profiles: Profiles | None = None
) -> Pool:
    """A pool under an encoder, each adapter at the mean of its samples."""
    prompts = encoder.encode([asked.text for asked in questions])
    return Pool(tasks, questions, adapter_vectors(encoder, tasks), prompts, profiles or Profiles())


def adapter_vectors(encoder: Encoder, tasks: Sequence[Task]) -> Matrix:
    """(tasks, d) the mean of each one's samples, brought to length 1."""
    texts = encoder.encode([text for task in tasks for text in task.inputs])
    ends = np.cumsum([len(task.inputs) for task in tasks])[:-1]
    return np.stack([mean_vector(part) for part in np.split(texts, ends)])


def ranks(scores: Scores, gold: NDArray[np.int64]) -> Ranks:
    """(questions,) how many adapters come before the right one; those that score as it does come before it."""
    own = np.take_along_axis(scores, gold[:, None], axis=1)
    found: Ranks = (scores >= own).sum(axis=1) - 1
    return found


def accuracy(places: Ranks) -> Row:
    """Percent of the questions whose adapter is among the first 1, 3, 5, 8, and 100 times the mean reciprocal rank."""
    if not len(places):
        return {}
    found: Row = {f"top{k}": 100 * float(np.mean(places < k)) for k in KS}
    return {**found, "mrr": 100 * float(np.mean(1 / (places + 1)))}


def over(rows: Sequence[Row]) -> Row:
    """Mean, lowest and highest of each number over several runs; of one run the number itself."""
    if len(rows) == 1:
        return dict(rows[0])
    return {key: _spread([row[key] for row in rows]) for key in (rows[0] if rows else {})}


def value_of(cell: float | Mapping[str, float]) -> float:
    """A cell's number."""
    return cell["value"] if isinstance(cell, Mapping) else cell


def with_and_without(rerank: bool) -> Row:
    """The column that tells whether the nearest were reranked."""
    return {"rerank": "yes" if rerank else "no"}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"value": float(np.mean(values)), "low": min(values), "high": max(values)}
