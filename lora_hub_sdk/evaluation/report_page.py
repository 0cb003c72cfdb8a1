"""A report as a page of markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.evaluation.groups import PERFECT, TITLES, Group
from lora_hub_sdk.evaluation.recommendation import interval_text

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.intervals import Interval
    from lora_hub_sdk.evaluation.report import Report, SystemReport

_DASH: Final = "-"


def page(report: Report) -> str:
    """The whole page; it ends with a line break."""
    parts = [
        "# Mixed-task benchmark",
        _facts(report),
        "## What to use",
        *report.recommendation.sentences(),
        "## By cluster",
        "Percent; the mean over tasks of each task's mean. Brackets hold 95 % of 2000 draws of the questions within "
        "their tasks; ratios are paired. A question mark is a bound that cannot be told.",
        _by_domain(report),
        *_notes(report),
        "## In groups",
        _in_groups(report),
        "## By task",
        _by_task(report),
        *_companions(report),
        "## Where the time went",
        _times(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(report: Report) -> str:
    lines = [
        f"{report.questions} questions of {len(report.domains)} tasks in {len(set(report.domains.values()))} clusters, "
        f"{report.adapters} adapters, {len(report.systems)} systems.",
        "",
        *(f"- {name}: {_code(value)}" for name, value in report.told.items()),
        f"- base model: {_code(report.about.get('base model', ''))}, {report.about.get('number format', '')} on "
        f"{report.about.get('device', '')}",
        *([f"- tasks without an adapter of their own: {', '.join(report.orphans)}"] if report.orphans else []),
        f"- seed of the intervals' draws: {report.seed}",
        f"- digest of the questions: {_code(report.about.get('questions', '')[:16])}",
    ]
    return "\n".join(lines)


def _by_domain(report: Report) -> str:
    domains = sorted(set(report.domains.values()))
    rows = [
        [
            f"`{one.name}`",
            *(_value(one.domains[domain]) for domain in domains),
            interval_text(one.overall),
            _DASH if one.name == PERFECT else interval_text(one.to_perfect, 3),
        ]
        for one in report.systems
    ]
    return _table(["system", *domains, "overall", "to perfect"], rows)


def _notes(report: Report) -> list[str]:
    partly = [f"`{one.name}` {one.answered}" for one in report.systems if one.answered < report.questions]
    failed = [f"`{one.name}` {one.errors}" for one in report.systems if one.errors]
    missing = [f"`{one.name}` {one.missing}" for one in report.systems if one.missing]
    notes = []
    if partly:
        notes.append(
            f"Not all of the {report.questions} questions are answered by {', '.join(partly)}; their means are over "
            "those that are, ratios over those that both systems answered."
        )
    if failed:
        notes.append(f"Questions that failed, and are asked again by the next run: {', '.join(failed)}.")
    if missing:
        notes.append(f"**The run is not complete**; not asked yet: {', '.join(missing)}.")
    if report.left_out:
        notes.append("Left out:\n\n" + "\n".join(f"- `{name}`: {_cell(why)}" for name, why in report.left_out.items()))
    return notes


def _in_groups(report: Report) -> str:
    rows = []
    groups: tuple[Group, ...] = ("reference", "seen", "learned", "unseen")
    for group in groups:
        rows += [_group_row(one) for one in report.systems if one.group == group]
    head = ["group", "system", "overall", "held against", "ratio", "adapters a prompt", "own adapter found", "answered"]
    return _table(head, rows, texts=2)


def _group_row(one: SystemReport) -> list[str]:
    itself = one.name == one.reference
    return [
        TITLES[one.group],
        f"`{one.name}`",
        interval_text(one.overall),
        _DASH if itself else f"`{one.reference}`",
        _DASH if itself else interval_text(one.to_reference, 3),
        _DASH if one.adapters is None else f"{one.adapters:.1f}",
        _DASH if one.own is None else f"{100 * one.own:.0f} %",
        str(one.answered),
    ]


def _by_task(report: Report) -> str:
    rows = [
        [task, domain, report.metrics[task], *(_value(one.tasks[task]) for one in report.systems)]
        for task, domain in sorted(report.domains.items(), key=lambda item: (item[1], item[0]))
    ]
    return _table(["task", "cluster", "metric", *(f"`{one.name}`" for one in report.systems)], rows, texts=3)


def _companions(report: Report) -> list[str]:
    kinds = list(dict.fromkeys(kind for one in report.systems for kind in one.companions))
    if not kinds:
        return []
    rows = [
        [f"`{one.name}`", *(f"{one.companions[kind]:.1f}" if kind in one.companions else _DASH for kind in kinds)]
        for one in report.systems
    ]
    return [
        "## Other metrics",
        "ROUGE over the tasks of ROUGE, BLEU of each task's whole corpus.",
        _table(["system", *kinds], rows),
    ]


def _times(report: Report) -> str:
    rows = [[f"`{one.name}`", f"{one.prepare_s:.1f}", f"{one.route_s:.1f}"] for one in report.systems]
    total = (
        f"{report.generated} answers of {report.tokens} tokens in {report.answer_s:.0f} s, all systems together, equal "
        "routes once."
    )
    return f"{total}\n\n{_table(['system', 'learning, s', 'routing, s'], rows)}"


def _value(interval: Interval) -> str:
    return _DASH if math.isnan(interval.value) else f"{interval.value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """``texts`` columns to the left, the others to the right."""
    rule = ["---" if place < texts else "---:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _code(text: str) -> str:
    """Between more backticks than it has in a row itself."""
    inner = " ".join(text.split())
    ticks = "`" * (max(map(len, re.findall("`+", inner)), default=0) + 1)
    return f"{ticks} {inner} {ticks}" if "`" in inner else f"{ticks}{inner}{ticks}"
