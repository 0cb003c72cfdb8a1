"""How often the right adapter is found: every number that is told of the retriever, with its seeds.

Encoders are trained on the paper's tasks and on others, one after the other: about an hour on two idle cores.
Each is kept in the cache folder with all vectors, so that a run that was killed goes on, and a second one takes
minutes. The evaluation data must lie beside this checkout.

    python -m benchmarks.retriever
    python -m benchmarks.retriever --quick table2 means
    python -m benchmarks.retriever --json pool | jq '.parts.pool[0].rows'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import _retriever_data as data
from benchmarks._report import machine
from benchmarks._retriever_abstain import abstain
from benchmarks._retriever_arrivals import arrivals
from benchmarks._retriever_data import Material
from benchmarks._retriever_effort import FULL, QUICK, Effort
from benchmarks._retriever_figures import draw
from benchmarks._retriever_lab import Lab, say
from benchmarks._retriever_means import means
from benchmarks._retriever_pool import pools
from benchmarks._retriever_score import Table
from benchmarks._retriever_tables import fractions, other_tasks, samples, table2
from benchmarks._retriever_wordings import Distractors, distractors
from lora_hub_sdk.config import cache_home

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 180


class Data:
    """What is measured on, read when it is first needed."""

    @cached_property
    def paper(self) -> Material:
        """The paper's tasks and questions."""
        return data.paper()

    @cached_property
    def tasks(self) -> Material:
        """The other tasks, and theirs."""
        return data.other_tasks()

    @cached_property
    def distractors(self) -> Distractors:
        """Made-up adapters."""
        return distractors(data.training_rows(), data.training_domains())


@dataclass(frozen=True, slots=True)
class Report:
    """One run. ``parts``: the tables of each."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    parts: Mapping[str, Sequence[Table]]


Measure = Callable[[Lab, Data, Effort], list[Table]]

PARTS: Mapping[str, Measure] = {
    "table2": lambda lab, given, effort: table2(lab, given.paper, effort),
    "tasks": lambda lab, given, effort: other_tasks(lab, given.tasks, effort),
    "fraction": lambda lab, given, effort: fractions(lab, given.paper, effort),
    "samples": lambda lab, given, effort: samples(lab, given.paper, effort),
    "pool": lambda lab, given, effort: pools(lab, given.paper, given.distractors, effort),
    "arrivals": lambda lab, given, effort: arrivals(lab, given.paper, given.distractors, effort),
    "means": lambda lab, given, effort: means(lab, given.paper, effort),
    "abstain": lambda lab, given, effort: abstain(lab, [given.paper, given.tasks], effort),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not data.DATA.is_dir():
        print("skipped: the evaluation data is not beside this checkout")
        return
    lab, given = Lab(options.cache, train=not options.quick), Data()
    report = measure(options.parts or list(PARTS), lab, given, QUICK if options.quick else FULL)
    if options.figures:
        for path in draw(report.parts, lab, given.paper, options.figures):
            say(f"wrote {path}")
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        show(report)


def measure(parts: Sequence[str], lab: Lab, given: Data, effort: Effort) -> Report:
    """The parts, one after the other."""
    found: dict[str, list[Table]] = {}
    for part in parts:
        say(f"measuring: {part}")
        found[part] = PARTS[part](lab, given, effort)
    recipe = {key: str(value) for key, value in asdict(lab.recipe).items()}
    return Report(machine(), {"effort": asdict(effort), "recipe": recipe}, found)


def show(report: Report) -> None:
    """Print tables."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # a file takes tables as wide as they are
    console.print(f"{report.machine}\n{report.settings}", markup=False, highlight=False)
    for tables in report.parts.values():
        for table in tables:
            _print_table(console, table)


def _print_table(console: Console, table: Table) -> None:
    from rich.table import Table as Shown

    columns = list(dict.fromkeys(key for row in table.rows for key in row))
    shown = Shown(*columns, title=table.title, title_justify="left", caption=table.note, caption_justify="left")
    for row in table.rows:
        shown.add_row(*(_cell(row.get(column, "")) for column in columns))
    console.print(shown if table.rows else f"{table.title}: nothing to show, no trained encoder is in the cache")


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        number, low, high = (f"{value[key]:.1f}" for key in ("value", "low", "high"))
        return number if low == high else f"{number} ({low}-{high})"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retriever", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="a little of each part; trains nothing")
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_home() / "retriever-benchmark",
        help="where trained encoders and vectors are kept",
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write figures and their data here")
    return parser


if __name__ == "__main__":
    main()
