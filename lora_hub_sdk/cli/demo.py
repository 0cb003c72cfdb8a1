"""``demo``: the packaged adapters at work, from a Hub to composed answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress, TaskID

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import quiet_libraries
from lora_hub_sdk.cli.options import AsJson
from lora_hub_sdk.cli.progress import bars


def add_to(app: typer.Typer) -> None:
    """Add this module's command."""
    command(app, "demo")(demo)


def demo(
    *,
    database: Annotated[
        str | None, typer.Option(help="Keep the registry here; by default it is gone afterwards.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where pulled adapters are kept; by default beside the database.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Number format of the base model; by default the faster one here."),
    ] = None,
    per_task: Annotated[int, typer.Option(min=1, help="Held-out prompts of each task to measure.")] = 10,
    seed: Annotated[int, typer.Option(help="Draws the prompts.")] = 0,
    as_json: AsJson = False,
) -> Outcome:
    """Register ten small adapters from a local Hub, answer mixed prompts with them, and measure what it is worth."""
    quiet_libraries()
    from lora_hub_sdk.demo.report import render
    from lora_hub_sdk.demo.run import DemoOptions, run_demo

    options = DemoOptions(database=database, cache_dir=cache_dir, dtype=dtype, per_task=per_task, seed=seed)
    with bars() as progress:
        report = run_demo(options, watcher=_Bars(progress))
    return Outcome(report.as_dict(), render(report))


class _Bars:
    """One progress bar for each part of the demo (a ``lora_hub_sdk.demo.run.Watcher``)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def step(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
