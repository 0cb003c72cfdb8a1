"""The mixed-task benchmark on the zoo: every system over the same questions, one table, by one command.

    python -m benchmarks.mixed --output FOLDER
    python -m benchmarks.mixed --output FOLDER --zoo MORE_ADAPTERS --curves --throughput --figures
    python -m benchmarks.mixed --output FOLDER --systems base,perfect,selection,mixture --per-task 5 --json

Killed at any moment, the same command goes on where it was. Numbers are bfloat16 unless ``--dtype float32`` is given:
half the time on a CPU, at a noise that depends on a row's neighbours and is a part of what the intervals are for.
Systems learn from the 20 training rows that the adapters are told by; the questions are test rows. All needs adapters
and data that are not part of this project.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, get_args

from benchmarks._report import machine
from benchmarks._zoo import register_zoo, zoo_folders, zoo_questions, zoo_tasks, zoo_training
from lora_hub_sdk import LoraHub, ModelSettings
from lora_hub_sdk.engine.base_model import DType
from lora_hub_sdk.evaluation.curves import curve_systems
from lora_hub_sdk.evaluation.figures import draw_figures
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.report import Report, make_report
from lora_hub_sdk.evaluation.run import run
from lora_hub_sdk.evaluation.systems import SYSTEMS
from lora_hub_sdk.evaluation.throughput import measure_throughput

BASE: Final = "smollm2-135m-instruct"
_PER_TASK: Final = 20


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if not zoo_folders(options.zoo):
        print("skipped: the adapters and their tasks' rows are not beside this checkout")
        return
    report = measure(options, command=shlex.join(["python", "-m", "benchmarks.mixed", *given]))
    print(json.dumps(report.as_dict(), ensure_ascii=False) if options.json else report.markdown())


def measure(options: argparse.Namespace, *, command: str = "") -> Report:
    """Register the zoo, ask all systems what is not answered yet, and write the report and what else is asked for."""
    options.output.mkdir(parents=True, exist_ok=True)
    settings = ModelSettings(options.dtype, options.device)
    with zoo_ground(options.output, options.zoo, settings, seed=options.seed, progress=not options.json) as ground:
        tasks = zoo_tasks() if options.all_tasks else tuple(ground.own)
        questions = zoo_questions(tasks, options.per_task, options.seed)
        where = ", ".join(f"{name} {value}" for name, value in machine().items())
        told = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": command,
            "machine": where,
            "learned from": "the 20 training rows of each task that its adapter is told by",
        }
        results = run(ground, questions, options.systems, output=options.output, strict=False, told=told)
        if options.curves:
            results = run(
                ground, questions, curve_systems(), output=options.output, strict=False, listed=False, told=told
            )
        if options.throughput:
            measure_throughput(ground, questions).save(options.output)
        report = make_report(results, seed=options.seed)
        report.write(options.output)
        if options.figures:
            draw_figures(options.output, ground=ground)
    return report


@contextmanager
def zoo_ground(
    folder: Path,
    more: Sequence[Path] = (),
    settings: ModelSettings | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[Ground]:
    """A hub with the zoo in it, and what systems learn from; all is kept in the folder."""
    with LoraHub(folder / "hub.db", index="exact", offline=True) as hub:
        own = register_zoo(hub, more, seed=seed, progress=progress)
        yield Ground(
            hub=hub,
            base_model=BASE,
            own=own,
            folder=folder / "learned",
            training=zoo_training(tuple(own), seed=seed),
            seed=seed,
            settings=settings,
            progress=progress,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new, or one to go on with")
    parser.add_argument("--per-task", type=int, default=_PER_TASK, help="questions of each task")
    parser.add_argument("--systems", type=_names, default=SYSTEMS, metavar="A,B", help="all of the table if not given")
    parser.add_argument("--zoo", type=Path, action="append", default=[], metavar="FOLDER", help="of more adapters")
    parser.add_argument("--all-tasks", action="store_true", help="ask also of tasks that no adapter was trained for")
    parser.add_argument("--curves", action="store_true", help="ask for quality by the number of adapters too")
    parser.add_argument("--throughput", action="store_true", help="measure tokens per second by batch size too")
    parser.add_argument("--figures", action="store_true", help="draw what there are numbers for")
    parser.add_argument("--dtype", choices=get_args(DType), default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a page")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    main()
