"""``bench mixed``, ``bench report`` and ``bench systems``: which strategy fits one's own adapters."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import AsJson, Database, Endpoint, Index, Namespace, Offline
from lora_hub_sdk.types import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedSet
    from lora_hub_sdk.evaluation.report import Report
    from lora_hub_sdk.evaluation.results import Results

Systems = Annotated[
    str | None,
    typer.Option(
        "--systems", help="Names with commas between them; lora-hub bench systems tells what they are.", metavar="NAMES"
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    group = typer.Typer(help="Measure which strategy fits your adapters.", no_args_is_help=True)
    command(group, "mixed")(mixed)
    command(group, "report")(report)
    command(group, "systems")(systems)
    app.add_typer(group, name="bench")


def mixed(
    questions: Annotated[
        str,
        typer.Argument(
            help='Rows of {"inputs", "targets", "task", "domain", "metric"}: a file, a folder of *.jsonl, a glob, or, '
            "with --split, a Hub dataset."
        ),
    ],
    *,
    output: Annotated[
        Path, typer.Option(help="Folder of answers and report; a run that was ended goes on in it.", metavar="FOLDER")
    ],
    base_model: Annotated[str, typer.Option(help="Folder, Hub id or embedded name.")] = "smollm2-135m-instruct",
    split: Annotated[
        str | None, typer.Option(help="The questions are this split of a Hub dataset.", metavar="NAME")
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            help="Rows like the questions, for systems that learn; those that are also questions are not used.",
            metavar="FILE",
        ),
    ] = None,
    own: Annotated[
        str | None,
        typer.Option(
            help='JSON {"task": "adapter"}; by default a task\'s own adapter has its name, or the tag task:NAME.',
            metavar="FILE",
        ),
    ] = None,
    chosen: Systems = None,
    per_task: Annotated[int, typer.Option(help="Questions of each task, drawn at random; 0 is all.", min=0)] = 20,
    training_per_task: Annotated[int, typer.Option(help="Training rows of each task; 0 is all.", min=0)] = 20,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also measure and draw quality by k, throughput and similarity.")
    ] = False,
    template: Annotated[
        Literal["auto", "chat", "alpaca", "adapter", "none"], typer.Option(help="How a prompt is framed for the model.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format of the base model.")
    ] = "auto",
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Ask every system every question, and tell which strategy to use; run again after a kill, it goes on."""
    from lora_hub_sdk.evaluation.mixed_set import MixedSet, load_mixed_hub, read_mixed

    if split is None:
        all_questions = read_mixed(questions)
    else:
        all_questions = load_mixed_hub(questions, split=split, endpoint=endpoint)
    asked = all_questions.sample(per_task, seed) if per_task else all_questions
    lessons = MixedSet(()) if training is None else read_mixed(training).without(all_questions)
    if training_per_task and len(lessons):
        lessons = lessons.sample(training_per_task, seed)
    if figures:
        _require_matplotlib()
    quiet_libraries()
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.own import own_by_name, read_own
    from lora_hub_sdk.evaluation.run import run
    from lora_hub_sdk.evaluation.systems import SYSTEMS

    names = _names(chosen)
    told = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": _command(
            questions,
            {
                "--split": split,
                "--base-model": base_model,
                "--training": training,
                "--own": own,
                "--systems": chosen,
                "--per-task": per_task,
                "--training-per-task": training_per_task if training else None,
                "--seed": seed,
                "--template": None if template == "auto" else template,
                "--dtype": None if dtype == "auto" else dtype,
                "--output": output,
            },
        ),
    }
    with open_hub(database, endpoint, index=index, offline=offline) as hub:
        pool = [one for one in hub.list(namespace=namespace, base_model=base_model) if one.state == "active"]
        tasks = sorted({*asked.tasks, *lessons.tasks})
        ground = Ground(
            hub=hub,
            base_model=base_model,
            own=own_by_name(tasks, pool) if own is None else read_own(own),
            folder=output / "learned",
            training=lessons,
            namespace=namespace,
            seed=seed,
            template=None if template == "none" else template,
            settings=ModelSettings(dtype),
            progress=not as_json,
        )
        results = run(ground, asked, names or SYSTEMS, output=output, strict=bool(names), told=told)
        outcome = _reported(results, (), seed)
        if figures:
            drawn = [str(file) for file in _drawn(ground, asked, output)]
            lines = [outcome.view, *(Text(f"wrote {file}") for file in drawn)]
            return Outcome({**outcome.data, "figures": drawn}, Group(*lines), outcome.exit_code)
    return outcome


def report(
    folder: Annotated[Path, typer.Argument(help="What bench mixed wrote, or is about to.")],
    *,
    chosen: Systems = None,
    seed: Annotated[int, typer.Option(help="Of the draws behind the intervals.")] = 0,
    as_json: AsJson = False,
) -> Outcome:
    """Make the report of a run again from its answers; nothing is asked."""
    from lora_hub_sdk.evaluation.results import Results

    return _reported(Results.read(folder), _names(chosen), seed)


def systems(*, as_json: AsJson = False) -> Outcome:
    """Name the systems that can be measured; "@5" behind a name gives another number of adapters than 3."""
    from lora_hub_sdk.evaluation.systems import DESCRIPTIONS, SYSTEMS, system

    data = [
        {"name": name, "description": told, "learns": system(name).learns, "listed": name in SYSTEMS}
        for name, told in DESCRIPTIONS.items()
    ]
    table = Table(title="systems", title_justify="left")
    for column in ("name", "rows needed", "what it is"):
        table.add_column(column, overflow="fold")
    for one in data:
        table.add_row(Text(str(one["name"])), "yes" if one["learns"] else "", Text(str(one["description"])))
    return Outcome(data, table)


def _names(given: str | None) -> list[str]:
    return [] if given is None else [name.strip() for name in given.split(",") if name.strip()]


def _command(questions: str, options: dict[str, object]) -> str:
    """What a reader types to have the same run."""
    words = ["lora-hub", "bench", "mixed", questions]
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    return shlex.join(words)


def _reported(results: Results, names: Sequence[str], seed: int) -> Outcome:
    from lora_hub_sdk.evaluation.report import make_report

    found = make_report(results, systems=names, seed=seed)
    files = [str(file) for file in found.write(results.folder)]
    data = {**found.as_dict(), "folder": str(results.folder), "files": files}
    return Outcome(data, _view(found, results, files), exit_code=1 if results.errors else 0)


def _view(found: Report, results: Results, files: Sequence[str]) -> RenderableType:
    from lora_hub_sdk.evaluation.recommendation import interval_text

    table = Table(title=f"{found.questions} questions, {found.adapters} adapters", title_justify="left")
    table.add_column("system")
    for column in ("mean, %", "held against", "ratio", "adapters"):
        table.add_column(column, justify="right")
    for one in found.systems:
        table.add_row(
            Text(one.name),
            Text(interval_text(one.overall)),
            Text("" if one.name == one.reference else one.reference),
            Text("" if one.name == one.reference else interval_text(one.to_reference, 3)),
            "" if one.adapters is None else f"{one.adapters:.1f}",
        )
    lines: list[RenderableType] = [table, *map(Text, found.recommendation.sentences())]
    lines += [Text(f"left out {name}: {why}") for name, why in found.left_out.items()]
    missing = sum(one.missing for one in found.systems)
    if missing:
        lines.append(Text(f"{missing} answers are still to come: the run is not complete", style="red"))
    if results.errors:
        first = results.errors[0]
        lines.append(
            Text(
                f"{len(results.errors)} questions failed, the first one of {first.task!r} by {first.system}: "
                f"{first.error}; run the same command again to ask them again",
                style="red",
            )
        )
    return Group(*lines, *(Text(f"wrote {file}") for file in files))


def _require_matplotlib() -> None:
    """Before a run that may take hours."""
    from importlib.util import find_spec

    from lora_hub_sdk.errors import MissingExtraError

    if find_spec("matplotlib") is None:
        raise MissingExtraError("--figures", "evaluation")


def _drawn(ground: Ground, questions: MixedSet, output: Path) -> list[Any]:
    from lora_hub_sdk.evaluation.curves import curve_systems
    from lora_hub_sdk.evaluation.figures import draw_figures
    from lora_hub_sdk.evaluation.run import run
    from lora_hub_sdk.evaluation.throughput import measure_throughput

    run(ground, questions, curve_systems(), output=output, strict=False, listed=False)
    measure_throughput(ground, questions).save(output)
    return draw_figures(output, ground=ground)
