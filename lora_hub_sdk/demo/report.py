"""The demo's report for people: answers side by side, the table of systems, and what to try next."""

from __future__ import annotations

import shlex
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.demo.run import Answered, DemoReport
from lora_hub_sdk.types import RouteDict

_SHORT: Final = 100
_DEFAULT_DATABASE: Final = "demo.db"
_EXAMPLE: Final = "Convert this date to ISO 8601: 3 mai 1968"


def render(report: DemoReport) -> Group:
    """Everything that the demo prints when it is done."""
    return Group(*map(_answered, report.answered), _systems(report), _retrieval(report), *what_next(report.database))


def what_next(database: str | None) -> tuple[Text, ...]:
    """Three commands that continue where the demo ended; without a kept registry the first one makes it."""
    place = f"--database {shlex.quote(database or _DEFAULT_DATABASE)}"
    commands = [
        f"lora-hub list {place}" if database else f"lora-hub demo {place}",
        f"lora-hub search {shlex.quote(_EXAMPLE)} {place}",
        f"lora-hub generate {shlex.quote(_EXAMPLE)} --weights similarity {place}",
    ]
    return (Text("What next:", style="bold"), *(Text(f"  {command}") for command in commands))


def _answered(answered: Answered) -> RenderableType:
    lines = Text()
    lines.append(f"{answered.task}: ", style="bold cyan")
    lines.append(f"{_short(answered.prompt)}\n", style="bold")
    for label, value in (
        ("found", _members(answered.route)),
        ("base model", _short(answered.base_answer)),
        ("composed", _short(answered.answer)),
        ("expected", _short(answered.expected)),
    ):
        lines.append(f"  {label:<11}", style="dim")
        lines.append(f"{value}\n", style="green" if label == "composed" else "")
    return lines


def _members(route: RouteDict) -> str:
    shown = (
        f"{member['name']} {'pinned' if member['score'] is None else format(member['score'], '.2f')}"
        f" (x{member['weight']:.2f})"
        for member in route["adapters"]
    )
    return ", ".join(shown) or "nothing: the base model answers"


def _systems(report: DemoReport) -> Table:
    table = Table(title=f"{report.measured_prompts} held-out prompts, {report.dtype}", title_justify="left")
    table.add_column("system")
    table.add_column("score %", justify="right")
    table.add_column("seconds", justify="right")
    for system in report.systems:
        table.add_row(system.system, f"{system.score:.1f}", f"{system.seconds:.1f}")
    return table


def _retrieval(report: DemoReport) -> Text:
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in report.seconds.items())
    return Text(
        f"The prompt's own adapter was found first for {report.top1:.0f} %, in the first three for "
        f"{report.top3:.0f} %.\nTime: {spent}\n"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else f"{line[: _SHORT - 3]}..."
