"""How well a retriever finds the adapter of each question's task (paper section 4.2, table 2 and figure 3)."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.accuracy import GROUPS, Accuracies, Accuracy, Mean, Share, accuracy, mean_over
from lora_hub_sdk.retriever.encoder import Encoder, SentenceEncoder, unit
from lora_hub_sdk.retriever.lexicon import grams, profile
from lora_hub_sdk.retriever.query import check_k, check_prompts, names_of
from lora_hub_sdk.retriever.questions import Question, read_questions
from lora_hub_sdk.retriever.reranker import CANDIDATES, relevance
from lora_hub_sdk.retriever.settings import settings_of
from lora_hub_sdk.retriever.tasks import Task, task_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Accuracies",
    "Accuracy",
    "Evaluation",
    "Mean",
    "Question",
    "Share",
    "TaskScore",
    "evaluate_retriever",
    "evaluate_vectors",
    "mean_over",
    "read_questions",
]

#: Digits at which two cosines are one: an encoder gives a text's vector no more alike from one batch to the next.
_DIGITS: Final = 6
#: Questions that are compared with all tasks at a time, which bounds the memory.
_ROWS: Final = 1024
#: Two tasks are taken for one where the other one of them came first for this share of their questions.
_INDISTINCT: Final = 1 / 3


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How one task's clean questions fared.

    Attributes:
        top_1: share whose own adapter came first; None where the task has no question.
        mistaken_for: the adapters that came first instead, and how often, the most frequent first.
    """

    task: str
    count: int
    top_1: float | None
    mistaken_for: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How well a retriever found each question's adapter, one adapter for each task.

    A question's rank is the worst among equals: an adapter that is exactly as near counts as nearer.

    Attributes:
        encoder: its name.
        fingerprint: its fingerprint.
        reranked: whether the nearest were reranked by their words.
        tasks: the tasks in the order given.
        trained: names of the tasks that the encoder was trained on, as far as they are among ``tasks``.
        accuracies: by group of questions, without and with leaked ones.
        vectors: (tasks, dimension) the adapters' vectors, of length 1.
        gold: (questions,) place of each question's own task in ``tasks``.
        first: (questions,) place of the adapter that came first.
        ranks: (questions,) rank of the own adapter, from 1.
        leaked: (questions,) whether the question stands among some task's samples, white space aside.
    """

    encoder: str
    fingerprint: str
    reranked: bool
    tasks: tuple[Task, ...]
    trained: tuple[str, ...]
    accuracies: Accuracies
    vectors: NDArray[np.float32]
    gold: NDArray[np.int64]
    first: NDArray[np.int64]
    ranks: NDArray[np.int64]
    leaked: NDArray[np.bool_]

    @property
    def similarity(self) -> NDArray[np.float32]:
        """(tasks, tasks) cosine between the adapters' vectors (paper figure 3)."""
        return self.vectors @ self.vectors.T

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(tasks, tasks) how often the column's adapter came first for a clean question of the row's task."""
        counts = np.zeros((len(self.tasks), len(self.tasks)), dtype=np.int64)
        np.add.at(counts, (self.gold[~self.leaked], self.first[~self.leaked]), 1)
        return counts

    @property
    def by_task(self) -> list[TaskScore]:
        """How each task's clean questions fared, in the order of ``tasks``."""
        counts = self.confusion
        found = []
        for place, task in enumerate(self.tasks):
            row = counts[place]
            others = sorted((other for other in np.flatnonzero(row) if other != place), key=lambda other: -row[other])
            found.append(
                TaskScore(
                    task.name,
                    int(row.sum()),
                    float(row[place] / row.sum()) if row.any() else None,
                    {self.tasks[other].name: int(row[other]) for other in others},
                )
            )
        return found

    @property
    def confused_pairs(self) -> list[tuple[str, str, int]]:
        """Two tasks and how many clean questions of one went to the other, both ways together; the most first."""
        both = np.triu(self.confusion + self.confusion.T, 1)
        pairs = [
            (self.tasks[a].name, self.tasks[b].name, int(both[a, b])) for a, b in zip(*both.nonzero(), strict=True)
        ]
        return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))

    @property
    def indistinct(self) -> list[tuple[str, ...]]:
        """Groups of tasks that this retriever hardly tells apart, the largest first.

        Two tasks are in one group where of the questions that went to either of them and are of either, a third or
        more went to the wrong one; so are tasks that others link. Chance alone would be a half.
        """
        counts = self.confusion
        groups = [{place} for place in range(len(self.tasks))]
        for a, b in zip(*np.triu(counts + counts.T, 1).nonzero(), strict=True):
            wrong = counts[a, b] + counts[b, a]
            if wrong >= _INDISTINCT * (wrong + counts[a, a] + counts[b, b]) and groups[a] is not groups[b]:
                groups[a] |= groups[b]
                for place in groups[b]:
                    groups[place] = groups[a]
        found = {id(group): tuple(self.tasks[place].name for place in sorted(group)) for group in groups}
        return sorted((group for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group))

    @property
    def ceiling(self) -> float | None:
        """Top 1 of the clean questions if a mistake inside a group of ``indistinct`` were none; None without any.

        What stays below 1 are mistakes between tasks that can be told apart.
        """
        clean = ~self.leaked
        if not clean.any():
            return None
        group_of = {name: number for number, group in enumerate(self.indistinct) for name in group}
        own = np.array([group_of.get(task.name, -1 - place) for place, task in enumerate(self.tasks)])
        return float((own[self.gold] == own[self.first])[clean].mean())

    def as_dict(self) -> dict[str, Any]:
        """Everything but vectors and single questions, as JSON knows it."""
        return {
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "reranked": self.reranked,
            "tasks": len(self.tasks),
            "trained": list(self.trained),
            "questions": len(self.gold),
            "leaked": int(self.leaked.sum()),
            **self.accuracies.as_dict(),
            "by_task": [
                {
                    "task": score.task,
                    "count": score.count,
                    "top_1": score.top_1,
                    "mistaken_for": dict(score.mistaken_for),
                }
                for score in self.by_task
            ],
            "confused_pairs": [list(pair) for pair in self.confused_pairs],
            "indistinct": [list(group) for group in self.indistinct],
            "ceiling": self.ceiling,
        }

    def table(self) -> str:
        """The accuracies in percent beside those of the paper's table 2, as a text."""
        return self.accuracies.table(f"{self.encoder}{', reranked' if self.reranked else ''}")


def evaluate_retriever(
    encoder: Encoder | str | os.PathLike[str],
    tasks: Sequence[Task],
    questions: Sequence[Question],
    *,
    trained: Iterable[str] = (),
    rerank: bool | None = None,
    ks: Iterable[int] = (1, 3, 5, 8),
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Measure how well an encoder finds the adapter of each question's task; no registry and no adapter is needed.

    Each task is one adapter, whose vector is the mean of its inputs' vectors (paper equation 1).

    Args:
        encoder: an encoder, or the folder, Hub id or embedded name of one.
        tasks: what is searched, one or more of different names.
        questions: one or more, each of one of the tasks.
        trained: names of the tasks that the encoder was trained on; their questions are the group "seen".
        rerank: whether the nearest are reranked by their words; None is what the encoder's settings say.
        ks: how many first adapters may hold the right one.
        resamples: bootstrap draws behind each 95 % interval; 0 for none.
        seed: of the bootstrap.

    Raises:
        ConfigurationError: no tasks or questions, names given twice, a question of an unknown task, a k below 1.
        EmptyPromptError: a question without text.
        SamplesError: a task without texts, or whose texts' vectors cancel out.
        ModelNotFoundError: no source has the encoder.
    """
    if isinstance(encoder, str | os.PathLike):
        encoder = SentenceEncoder(resolve_model(encoder))
    _check(tasks, questions)
    ks, trained = _asked(ks), names_of("trained", trained)
    return evaluate_vectors(
        tasks,
        questions,
        [rows.mean(axis=0) for rows in task_vectors(encoder, tasks).values()],
        encoder.encode([question.text for question in questions]),
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        trained=trained,
        rerank=settings_of(encoder).rerank if rerank is None else rerank,
        ks=ks,
        resamples=resamples,
        seed=seed,
    )


def evaluate_vectors(
    tasks: Sequence[Task],
    questions: Sequence[Question],
    vectors: Sequence[NDArray[np.float32]] | NDArray[np.float32],
    prompts: NDArray[np.float32],
    *,
    encoder: str = "vectors",
    fingerprint: str = "",
    trained: Iterable[str] = (),
    rerank: bool = False,
    ks: Iterable[int] = (1, 3, 5, 8),
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """As ``evaluate_retriever``, of vectors that were made before.

    Args:
        vectors: (tasks, dimension) one for each task, of any length above 0.
        prompts: (questions, dimension) one for each question, of length 1.

    Raises:
        ConfigurationError: as ``evaluate_retriever``, or vectors that are not as many as what they stand for.
        EmptyPromptError, SamplesError: as ``evaluate_retriever``.
    """
    _check(tasks, questions)
    places = {task.name: place for place, task in enumerate(tasks)}
    if len(vectors) != len(tasks) or len(prompts) != len(questions):
        raise ConfigurationError(
            f"{len(vectors)} vectors for {len(tasks)} tasks and {len(prompts)} for {len(questions)} questions: "
            "expected one for each"
        )
    means = np.stack([_directed(task, vector) for task, vector in zip(tasks, vectors, strict=True)])
    gold = np.array([places[question.task] for question in questions])
    ranks, first = np.empty_like(gold), np.empty_like(gold)
    profiles = [profile(task.inputs) for task in tasks] if rerank else []
    for start in range(0, len(gold), _ROWS):
        rows = slice(start, start + _ROWS)
        cosine = np.round(prompts[rows].astype(np.float64) @ means.T, _DIGITS)
        ranks[rows], first[rows] = _ranked(cosine, gold[rows])
        if rerank:
            for row, nearness in enumerate(cosine, start=start):
                near = _nearest(nearness, gold[row])
                known = [profiles[place] for place in near]
                found = relevance(nearness[near], grams(questions[row].text), known)
                # Beyond the reranked, the cosine's ranks stand.
                own = np.flatnonzero(near == gold[row])
                if own.size:
                    (rank,), (place,) = _ranked(found[None], own)
                    ranks[row], first[row] = rank, near[place]
                else:
                    first[row] = near[found.argmax()]
    samples = {_plain(text) for task in tasks for text in task.inputs}
    leaked = np.array([_plain(question.text) in samples for question in questions])
    names = frozenset(names_of("trained", trained))
    seen = np.array([question.task in names for question in questions])
    domains = [task.domain for task in tasks]
    right_domain = np.array(
        [
            np.nan if domains[own] is None else float(domains[own] == domains[found])
            for own, found in zip(gold, first, strict=True)
        ]
    )
    asked = _asked(ks)

    def of(kept: NDArray[np.bool_]) -> dict[str, Accuracy]:
        found: dict[str, Accuracy] = {}
        for name, mask in zip(GROUPS, (kept, kept & seen, kept & ~seen), strict=True):
            if found and mask.sum() == kept.sum():
                found[name] = found["all"]
            elif mask.any():
                found[name] = accuracy(ranks[mask], right_domain[mask], asked, resamples, seed)
        return found

    clean = of(~leaked)

    return Evaluation(
        encoder,
        fingerprint,
        rerank,
        tuple(tasks),
        tuple(task.name for task in tasks if task.name in names),
        Accuracies(clean, of(np.ones_like(leaked)) if leaked.any() else clean),
        means,
        gold,
        first,
        ranks,
        leaked,
    )


def _ranked(cosine: NDArray[np.float64], gold: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the rank of its own adapter and the place of the first one, ties against the own."""
    rows = np.arange(len(gold))
    own = cosine[rows, gold][:, None]
    ranks = (cosine >= own).sum(1)
    cosine[rows, gold] = -np.inf
    first = np.where(ranks == 1, gold, cosine.argmax(1))
    cosine[rows, gold] = own[:, 0]
    return ranks, first


def _nearest(cosine: NDArray[np.float64], own: int) -> NDArray[np.int64]:
    """Places of the adapters that are reranked, the nearest first; the own one after its equals."""
    return np.lexsort((np.arange(len(cosine)) == own, -cosine))[:CANDIDATES]


def _check(tasks: Sequence[Task], questions: Sequence[Question]) -> None:
    if not tasks or not questions:
        raise ConfigurationError(f"{len(tasks)} tasks and {len(questions)} questions: expected one or more of each")
    counts = Counter(task.name for task in tasks)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ConfigurationError(f"tasks named more than once: {', '.join(map(repr, twice))}; each is one adapter")
    if empty := [task.name for task in tasks if not task.inputs]:
        raise SamplesError(empty[0], "a task without texts has no vector; give it some, a dozen prompts do well")
    check_prompts([question.text for question in questions])
    if unknown := sorted({question.task for question in questions} - counts.keys()):
        close = difflib.get_close_matches(unknown[0], counts, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "; leave its questions out, or add the task"
        raise ConfigurationError(
            f"{len(unknown)} tasks of questions are not among the {len(tasks)} tasks, the first is {unknown[0]!r}{hint}"
        )


def _asked(ks: Iterable[int]) -> tuple[int, ...]:
    given = tuple(ks)
    for k in given:
        check_k(k)
    return tuple(sorted(set(given)))


def _directed(task: Task, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        return unit(vector)
    except ValueError as error:
        raise SamplesError(task.name, str(error)) from error


def _plain(text: str) -> str:
    return " ".join(text.split())
