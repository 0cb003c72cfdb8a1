"""The report of a run: every table's numbers with their intervals, from the answers in its folder and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_hub_sdk.composition.tensor_file import write_whole
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.answers import Answer
from lora_hub_sdk.evaluation.groups import BASE, PERFECT, SELECTION_UNSEEN, Group, group_of, in_order, reference_of
from lora_hub_sdk.evaluation.intervals import Interval, Scores
from lora_hub_sdk.evaluation.metrics import METRICS, corpus_bleu
from lora_hub_sdk.evaluation.recommendation import Recommendation, recommend
from lora_hub_sdk.evaluation.record import SystemRecord
from lora_hub_sdk.evaluation.results import Results

#: What is told beside the metrics themselves, for tasks that are measured by ROUGE.
ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class SystemReport:
    """One system's row.

    Attributes:
        name: of the system.
        group: what it is compared with.
        overall: the mean over tasks of the tasks' means, in percent, of the questions that it has answers to.
        domains: the same within each cluster, by its name.
        tasks: each task's mean.
        to_perfect: paired ratio to the own adapter alone; NaN where that was not asked.
        reference: the system that its group is held against.
        to_reference: paired ratio to that.
        companions: ROUGE-1, 2 and L over the tasks of any ROUGE, and the corpus' BLEU over those of BLEU: means over
            tasks, in percent. Those without such tasks are not there.
        adapters: how many a question's route has, on average.
        own: the share of routes with the task's own adapter among them, of questions whose task has one.
        answered: questions with an answer.
        without: questions that it has no answer to by its nature, as of tasks without an own adapter.
        errors: questions that failed.
        missing: questions that were not asked yet.
        prepare_s, route_s: seconds of learning and of finding the routes.
    """

    name: str
    group: Group
    overall: Interval
    domains: Mapping[str, Interval]
    tasks: Mapping[str, Interval]
    to_perfect: Interval
    reference: str
    to_reference: Interval
    companions: Mapping[str, float]
    adapters: float | None
    own: float | None
    answered: int
    without: int
    errors: int
    missing: int
    prepare_s: float
    route_s: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        told: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, value in told.items():
            if isinstance(value, Interval):
                told[name] = value.as_dict()
        for name in ("domains", "tasks"):
            told[name] = {key: one.as_dict() for key, one in told[name].items()}
        return {**told, "companions": dict(self.companions)}


@dataclass(frozen=True, slots=True)
class Report:
    """All tables.

    Attributes:
        questions, adapters: how many.
        domains: of each task, by its name.
        metrics: of each task, likewise.
        orphans: tasks without an adapter of their own.
        systems: in the catalogue's order.
        left_out: why others did not run, by name.
        recommendation: what follows for a user.
        about: what the answers stand on.
        told: what the caller says of the run, as date, command and seeds, in this order.
        answer_s: seconds of answering, of all systems together.
        generated: answers that were generated, equal routes once; ``tokens`` is how many tokens these have.
        seed: of the draws behind the intervals.
    """

    questions: int
    adapters: int
    domains: Mapping[str, str]
    metrics: Mapping[str, str]
    orphans: tuple[str, ...]
    systems: tuple[SystemReport, ...]
    left_out: Mapping[str, str]
    recommendation: Recommendation
    about: Mapping[str, str]
    told: Mapping[str, str]
    answer_s: float
    generated: int
    tokens: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """As ``report.json`` holds it."""
        told: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("domains", "metrics", "left_out", "about", "told"):
            told[name] = dict(told[name])
        return {
            **told,
            "systems": [one.as_dict() for one in self.systems],
            "recommendation": self.recommendation.as_dict(),
        }

    def markdown(self) -> str:
        """As a page that GitHub shows."""
        from lora_hub_sdk.evaluation.report_page import page

        return page(self)

    def write(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write report.md and report.json into a folder that exists; returns the two files."""
        files = Path(folder) / "report.md", Path(folder) / "report.json"
        content = json.dumps(self.as_dict(), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        for file, text in zip(files, (self.markdown(), content), strict=True):
            write_whole(file, text.encode("utf-8", "surrogatepass"))
        return files


def make_report(
    results: Results, *, systems: Sequence[str] = (), told: Mapping[str, str] | None = None, seed: int = 0
) -> Report:
    """The report of what a run's folder holds; the same answers give the same report.

    Args:
        systems: those of the tables; by default all that were asked for them.
        told: what to say of the run, as ``{"date": ...}``, in place of what ``run`` was told, or beside it.
        seed: of the draws behind the intervals.

    Raises:
        ConfigurationError: a system that was never asked, or none at all.
    """
    record, rows = results.record, results.questions.rows
    names = in_order(systems or record.listed)
    unknown = [name for name in names if name not in record.systems]
    if unknown or not names:
        raise ConfigurationError(
            f"systems={list(systems)!r}: {results.folder} has answers of {', '.join(record.systems) or 'none'}"
        )
    helpers = [name for name in (BASE, PERFECT, SELECTION_UNSEEN) if name in record.systems and name not in names]
    answers = _by_system(results.answers, [*names, *helpers], len(rows))
    scores = Scores.of(
        {name: [None if one is None else one.score for one in found] for name, found in answers.items()},
        [row.task for row in rows],
        seed=seed,
    )
    found = tuple(_system(name, record.systems[name], results, scores, answers[name]) for name in names)
    learns = {name: record.systems[name].learns for name in names}
    groups = {name: group_of(name, learns=learns[name]) for name in names}
    return Report(
        questions=len(rows),
        adapters=record.adapters,
        domains=results.questions.domains,
        metrics={row.task: row.metric for row in sorted(rows, key=lambda row: row.task)},
        orphans=tuple(task for task in results.questions.tasks if task not in record.own),
        systems=found,
        left_out=dict(record.left_out),
        recommendation=recommend(
            scores,
            seen=[name for name in names if groups[name] in ("seen", "learned")],
            unseen=[name for name in names if groups[name] == "unseen"],
            known=record.own,
            adapters={one.name: one.adapters for one in found if one.adapters is not None},
            taught=[name for name in names if learns[name]],
        ),
        about=record.about,
        told={**record.told, **(told or {})},
        answer_s=record.answer_s,
        generated=record.answered,
        tokens=record.tokens,
        seed=seed,
    )


def _system(
    name: str, record: SystemRecord, results: Results, scores: Scores, answers: Sequence[Answer | None]
) -> SystemReport:
    there = [one for one in answers if one is not None]
    group = group_of(name, learns=record.learns)
    domains = results.questions.domains
    own = [
        any(member["name"] == results.record.own[one.task] for member in one.route["adapters"])
        for one in there
        if one.route is not None and one.task in results.record.own
    ]
    widths = [len(one.route["adapters"]) for one in there if one.route is not None]
    return SystemReport(
        name=name,
        group=group,
        overall=scores.mean(name),
        domains={
            domain: scores.within([task for task, of in domains.items() if of == domain]).mean(name)
            for domain in sorted(set(domains.values()))
        },
        tasks={task: scores.within([task]).mean(name) for task in domains},
        to_perfect=_ratio(scores, name, PERFECT),
        reference=reference_of(group),
        to_reference=_ratio(scores, name, reference_of(group)),
        companions=_companions(there, results),
        adapters=fmean(widths) if widths else None,
        own=fmean(own) if own else None,
        answered=sum(one.text is not None for one in there),
        without=sum(one.text is None and one.error is None for one in there),
        errors=sum(one.error is not None for one in there),
        missing=len(answers) - len(there),
        prepare_s=record.prepare_s,
        route_s=record.route_s,
    )


def _ratio(scores: Scores, system: str, other: str) -> Interval:
    return scores.ratio(system, other) if other in scores.systems else Interval(float("nan"))


def _companions(answers: Iterable[Answer], results: Results) -> dict[str, float]:
    by_task: dict[str, list[Answer]] = {}
    for one in answers:
        if one.text is not None:
            by_task.setdefault(one.task, []).append(one)
    found: dict[str, list[float]] = {}
    for of_task in by_task.values():
        kinds = METRICS[of_task[0].metric].companions
        for kind in ROUGES:
            if kind in kinds:
                found.setdefault(kind, []).append(fmean(one.scores[kind] for one in of_task))
        if "bleu" in kinds:
            texts = [one.text or "" for one in of_task]
            targets = [results.questions.rows[one.question].targets for one in of_task]
            found.setdefault("corpus BLEU", []).append(corpus_bleu(texts, targets))
    return {kind: fmean(values) for kind, values in found.items()}


def _by_system(answers: Iterable[Answer], systems: Iterable[str], count: int) -> dict[str, list[Answer | None]]:
    found: dict[str, list[Answer | None]] = {name: [None] * count for name in systems}
    for one in answers:
        if one.system in found:
            found[one.system][one.question] = one
    return found
