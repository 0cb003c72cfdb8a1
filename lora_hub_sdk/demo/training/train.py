"""Make the demo adapters: ``python -m lora_hub_sdk.demo.training.train``.

For each task: build the rows, score the base model, train, score the saved adapter, write the folder. A
folder appears under its name only when it is complete, so an interrupted run is resumed by starting it again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lora_hub_sdk.demo.training._cards import Report, model_card, result_table, write_files
from lora_hub_sdk.demo.training._learning import Learner
from lora_hub_sdk.demo.training._rows import Task, build_split
from lora_hub_sdk.demo.training.metrics import mean_score
from lora_hub_sdk.demo.training.recipes import RECIPES
from lora_hub_sdk.demo.training.sources import SourceCache, default_cache_folder
from lora_hub_sdk.demo.training.tasks import TASKS

ADAPTER_FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "heldout.jsonl",
    "samples.jsonl",
    "training.json",
)
_SEED = 7
_TRAIN_ROWS = 1600
_KEEP_MEMORY = str(1 << 30)


@dataclass(frozen=True)
class Run:
    """What all tasks of one call share."""

    learner: Learner
    cache: SourceCache
    output: Path
    force: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.table:
        print(result_table(options.output, tuple(TASKS)))
        return 0
    run = Run(Learner(_base_folder(options.base)), SourceCache(options.cache), options.output, options.force)
    for name in options.task or TASKS:
        make_adapter(TASKS[name], run)
    return 0


def make_adapter(task: Task, run: Run) -> None:
    """Train ``task`` and put its folder under ``run.output``, unless a complete one is there already."""
    folder = run.output / task.name
    if _is_complete(folder) and not run.force:
        print(f"{task.name}: complete, skipped (use --force to train again)", flush=True)
        return
    run.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{task.name}-", dir=run.output))
    try:
        report = _train_into(work, task, run)
        _replace_folder(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{task.name}: {report.before:.1f} -> {report.after:.1f} in {report.seconds:.0f} s", flush=True)


def _train_into(folder: Path, task: Task, run: Run) -> Report:
    recipe = RECIPES[task.name]
    split = build_split(task, run.cache, train_rows=_TRAIN_ROWS, seed=_SEED)
    targets = [row.targets for row in split.heldout]

    base_answers = run.learner.answer(split.heldout, max_new_tokens=task.max_new_tokens)
    log = run.learner.train(recipe, split.train, seed=_SEED, folder=folder)
    answers = run.learner.answer(split.heldout, max_new_tokens=task.max_new_tokens, adapter=folder)
    report = Report(
        task=task.name,
        metric=task.metric,
        before=round(mean_score(task.metric, base_answers, targets), 1),
        after=round(mean_score(task.metric, answers, targets), 1),
        recipe=recipe,
        seed=_SEED,
        train_rows=len(split.train),
        seconds=round(log.seconds, 1),
        losses=log.losses,
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
    )
    write_files(folder, report, split, model_card(task, report, split.samples))
    return report


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def _replace_folder(work: Path, folder: Path) -> None:
    """Rename ``work`` to ``folder``; an older folder gives way only once the new one is ready."""
    # Temporary folders and safetensors files are private to their owner; these are made to be shared.
    for path in (work, *work.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        old = work.with_name(f"{work.name}-old")
        folder.rename(old)
        work.rename(folder)
        shutil.rmtree(old)
    else:
        work.rename(folder)


def _base_folder(given: Path | None) -> Path:
    if given is not None:
        return given
    from lora_hub_sdk.models import resolve_model

    return resolve_model("smollm2-135m-instruct").folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_hub_sdk.demo.training.train", description=__doc__)
    parser.add_argument("--task", action="append", choices=tuple(TASKS), help="train only this task (repeatable)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "adapters", help="folder to fill")
    parser.add_argument("--base", type=Path, help="local folder of the base model; looked up if not given")
    parser.add_argument("--cache", type=Path, default=default_cache_folder(), help="folder that keeps raw data")
    parser.add_argument("--force", action="store_true", help="train again where a complete folder exists")
    parser.add_argument("--table", action="store_true", help="print the result table of --output and stop")
    return parser


if __name__ == "__main__":
    # glibc reads these at start-up only; without them each training step hands its memory back.
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        environment = {"MALLOC_MMAP_THRESHOLD_": _KEEP_MEMORY, "MALLOC_TRIM_THRESHOLD_": _KEEP_MEMORY}
        arguments = [sys.executable, "-m", "lora_hub_sdk.demo.training.train", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **environment})
    raise SystemExit(main())
