"""How well every adapter does at every task, measured on a few rows and kept in the registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import LoraHubError, NoAdaptersError
from lora_hub_sdk.evaluation.asking import ask
from lora_hub_sdk.evaluation.metrics import METRICS, score
from lora_hub_sdk.types import Route, Routing, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.engine.request import Request
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow

#: Rows of a task that every adapter answers.
FIRST: Final = 4
#: New tokens of an answer, which only has to tell adapters apart.
_LONGEST: Final[Mapping[str, int]] = {"em": 16}
_LONGEST_ELSE: Final = 32
#: What decides between adapters of one score.
_FINER: Final = "f1"
_WINDOW: Final = 256
#: Scores by adapter, task and label.
_Marks = dict[tuple[str, str, str], float]


@dataclass(frozen=True, slots=True)
class TaskRanking:
    """The adapters of the pool in the order in which they do at a task, by successive halving.

    Every adapter answers the task's first 4 rows. The better half answers as many more, and so on, until a single
    adapter is left or there are no more rows: of 20 rows and n adapters about 9 n answers a task, at most 32 new tokens
    long, instead of 20 n. The score is the mean of the task's metric; where it is the same, token F1 decides, then the
    name. Who is dropped stands behind those who stay. Adapters of one content are measured once, under the first name.

    Scores are kept by ``hub.record_score`` under "lorauter METRIC, 8 rows, DIGEST", for the adapter's content. The
    digest is of these rows and of how they were asked. So they never meet a user's own scores, and other rows, another
    template or number format are measured anew.

    Attributes:
        system: whose name errors tell.
    """

    ground: Ground
    system: str = "lorauter"

    def of(self, rows: Mapping[str, Sequence[MixedRow]]) -> dict[str, tuple[str, ...]]:
        """For each task all adapters, the best first.

        Raises:
            NoAdaptersError: there are none.
            As ``hub.engine`` and ``Engine.generate``.
        """
        names = self._contents()
        rankings = {task: list(names) for task in rows}
        alive = dict.fromkeys(rows, len(names))
        marks = self._recorded(names)
        before, limit = 0, FIRST
        while contests := {
            task: rankings[task][: alive[task]] for task in rows if alive[task] > 1 and len(rows[task]) > before
        }:
            exams = {task: _Exam.of(self.ground, task, rows[task], before, limit) for task in contests}
            self._measure([(name, exams[task]) for task in contests for name in contests[task]], marks)
            for task, front in contests.items():
                exam = exams[task]
                front.sort(key=lambda name: (*(-marks[name, task, label] for label in exam.labels), name))
                rankings[task][: len(front)] = front
                alive[task] = -(-len(front) // 2)
            before, limit = limit, 2 * limit
        return {task: tuple(ranking) for task, ranking in rankings.items()}

    def _contents(self) -> list[str]:
        first: dict[str, str] = {}
        for name, adapter in sorted(self.ground.pool().items()):
            first.setdefault(adapter.digest, name)
        if not first:
            raise NoAdaptersError(
                f"system {self.system!r}: no adapters for {str(self.ground.base_model)!r} are in service"
            )
        return list(first.values())

    def _recorded(self, names: Iterable[str]) -> _Marks:
        hub, namespace = self.ground.hub, self.ground.namespace
        return {
            (name, one.task, one.metric): one.value
            for name in names
            for one in hub.scores(name, namespace=namespace)
            if one.current
        }

    def _measure(self, wanted: Iterable[tuple[str, _Exam]], marks: _Marks) -> None:
        """Put what is missing into the registry and into ``marks``, each score as soon as its last answer is there."""
        missing = [
            (name, exam) for name, exam in wanted if any((name, exam.task, label) not in marks for label in exam.labels)
        ]
        if not missing:
            return
        from tqdm.auto import tqdm

        hub, ground = self.ground.hub, self.ground
        requests = [((name, exam, row), request) for name, exam, row, request in self._requests(missing)]
        answers: dict[tuple[str, str], dict[MixedRow, str]] = {}
        engine = hub.engine(ground.base_model, ground.settings)
        with tqdm(total=len(requests), desc=self.system, unit="answer", disable=not ground.progress) as bar:
            for (name, exam, row), found in ask(engine, requests, _WINDOW):
                if isinstance(found, LoraHubError):
                    raise found
                bar.update()
                given = answers.setdefault((name, exam.task), {})
                given[row] = found.text
                if len(given) < len(exam.asked):
                    continue
                for label, value in exam.marked(given, [marks.get((name, exam.task, was)) for was in exam.before]):
                    hub.record_score(name, exam.task, label, value, namespace=ground.namespace)
                    marks[name, exam.task, label] = value

    def _requests(self, exams: Sequence[tuple[str, _Exam]]) -> Iterator[tuple[str, _Exam, MixedRow, Request]]:
        from lora_hub_sdk.engine.request import Request

        ground, routes = self.ground, dict[str, Route]()
        for name, exam in exams:
            if name not in routes:
                routing = Routing("selection", adapters=(name,), namespace=ground.namespace)
                asked = [exam.asked[0].inputs]
                routes[name] = ground.hub.route(asked, base_model=ground.base_model, routing=routing)[0]
            sampling = Sampling(exam.longest)
            for row in exam.asked:
                yield name, exam, row, Request(row.inputs, routes[name], sampling, ground.template, client="benchmark")


@dataclass(frozen=True, slots=True)
class _Exam:
    """One round of one task: the rows that are new in it, and what its scores are called in the registry.

    ``labels`` are of the metric and the finer one, over all rows up to here; ``before`` those of the round before.
    """

    task: str
    metrics: tuple[str, ...]
    asked: tuple[MixedRow, ...]
    count: int
    longest: int
    labels: tuple[str, ...]
    before: tuple[str, ...]

    @classmethod
    def of(cls, ground: Ground, task: str, rows: Sequence[MixedRow], start: int, end: int) -> _Exam:
        metrics = tuple(dict.fromkeys((METRICS[rows[0].metric].name, _FINER)))
        longest = _LONGEST.get(rows[0].metric, _LONGEST_ELSE)
        seen = tuple(rows[:end])
        was = _labels(ground, metrics, rows[:start], longest) if start else ()
        return cls(task, metrics, seen[start:], len(seen), longest, _labels(ground, metrics, seen, longest), was)

    def marked(self, given: Mapping[MixedRow, str], before: Sequence[float | None]) -> list[tuple[str, float]]:
        """The scores over all rows up to here, of the new answers and of the scores of the round before."""
        found = []
        for place, metric in enumerate(self.metrics):
            total = sum(score(metric, given[row], row.targets) for row in self.asked)
            if before:
                earlier = before[place]
                assert earlier is not None, "who is in this round was in the one before"
                total += earlier * (self.count - len(self.asked))
            found.append((self.labels[place], total / self.count))
        return found


def _labels(ground: Ground, metrics: Sequence[str], rows: Sequence[MixedRow], longest: int) -> tuple[str, ...]:
    settings = ground.settings
    template = ground.template
    asked = [
        [astuple(row) for row in rows],
        longest,
        template if isinstance(template, str | None) else getattr(template, "__qualname__", type(template).__name__),
        [settings.dtype, settings.quantization] if settings else ["auto", None],
    ]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    return tuple(f"lorauter {metric}, {len(rows)} rows, {digest}" for metric in metrics)
