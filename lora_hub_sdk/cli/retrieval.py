"""``eval-retriever``: how well an encoder finds the right adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, open_to_look, quiet_libraries
from lora_hub_sdk.cli.options import AsJson, Database, Endpoint, Offline, OneNamespace
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_hub_sdk.retriever.evaluation import Evaluation

#: Pairs of tasks that the text output names; the JSON has them all.
_SHOWN_PAIRS = 10


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "eval-retriever")(eval_retriever)


def eval_retriever(
    *,
    questions: Annotated[
        str, typer.Option(help='JSON lines of {"inputs", "task"}: what to ask, and the task it is of.', metavar="FILE")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help='JSON lines of {"inputs", "task"}, with or without a "domain": search these instead of the '
            "registry's samples.",
            metavar="FILE",
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Folder, Hub id or embedded name; by default the registry's.")
    ] = None,
    trained: Annotated[
        list[str] | None,
        typer.Option(
            help="A task that the encoder was trained on, or many: a trained encoder's folder, a .txt with names, or "
            'JSON lines, each a name or an object with "task"; may be repeated.',
            metavar="NAME|FOLDER|FILE",
        ),
    ] = None,
    rerank: Annotated[
        bool | None,
        typer.Option("--rerank/--no-rerank", help="Rerank the nearest by their words; by default as the encoder says."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw similarity and confusion of the tasks into this folder.", metavar="DIR")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals' bootstrap.")] = 0,
    database: Database,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: OneNamespace = None,
    as_json: AsJson = False,
) -> Outcome:
    """Measure how often the right adapter is among the first, beside the paper's numbers."""
    from lora_hub_sdk.retriever.questions import read_questions
    from lora_hub_sdk.retriever.tasks import read_tasks

    asked, names = read_questions(questions), _names(trained or ())
    searched = None if tasks is None else read_tasks(tasks)
    quiet_libraries()
    opening = open_hub if searched is None else open_to_look
    with opening(database, endpoint, offline=offline) as hub:
        found = hub.evaluate_retriever(
            asked, tasks=searched, encoder=encoder, namespace=namespace, trained=names, rerank=rerank, seed=seed
        )
    drawn = [] if figures is None else _draw(found, figures)
    data = {**found.as_dict(), "figures": [str(file) for file in drawn]}
    return Outcome(data, Group(*map(Text, (found.table(), *_confusions(found), *(f"wrote {file}" for file in drawn)))))


def _names(given: Iterable[str]) -> list[str]:
    """Names of tasks as they stand, and those in files and trained folders.

    Raises:
        ConfigurationError: a file or a folder cannot be read, or a line names no task.
    """
    from lora_hub_sdk.retriever.samples import read_samples

    names: list[str] = []
    for name in given:
        if Path(name).is_dir():
            names += _trained_on(Path(name))
            continue
        if not Path(name).is_file():
            names.append(name)
            continue
        for number, row in enumerate(read_samples(name), start=1):
            value: Any = row if isinstance(row, str) else row.get("task")
            if not isinstance(value, str) or not value.strip():
                raise ConfigurationError(f'--trained {name!r}, row {number}: expected a name or an object with "task"')
            names.append(value.strip())
    return names


def _trained_on(folder: Path) -> tuple[str, ...]:
    """Also the tasks that a training was stopped early by: the encoder was chosen by them."""
    from lora_hub_sdk.retriever.training_report import REPORT_FILE, TrainingReport

    try:
        report = TrainingReport.read(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"--trained {os.fspath(folder)!r}: no report of a training can be read from {REPORT_FILE}: {error}"
        ) from error
    return report.trained + report.held_out


def _draw(found: Evaluation, folder: Path) -> list[Path]:
    from lora_hub_sdk.retriever.figures import confusion_figure, similarity_figure

    return [*similarity_figure(found, folder / "similarity"), *confusion_figure(found, folder / "confusion")]


def _confusions(found: Evaluation) -> list[str]:
    lines = [f"{one} - {other}: {count}" for one, other, count in found.confused_pairs[:_SHOWN_PAIRS]]
    if lines:
        lines = ["", "most confused, of the questions that are no samples:", *(f"  {line}" for line in lines)]
    if found.indistinct:
        groups = "; ".join(", ".join(group) for group in found.indistinct)
        lines.append(f"hardly told apart: {groups}")
        lines.append(f"top 1 if each of these were one task: {100 * (found.ceiling or 0):.1f}")
    return lines
