"""Train one LoRA per task from rows of ``{"inputs", "targets"}``: more adapters where a cluster of tasks is thin.

The recipe is that of the adapters that are there already. Before and after are scores on training rows that are held
out; test rows are never read. A complete folder is left as it is, so a run that was killed goes on. On a CPU one task
takes a few minutes on one core; with glibc's MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set high, fewer.

    python -m benchmarks.zoo --task copa --task wikidata_qa --output FOLDER
    python -m benchmarks.zoo --task gsm8k --output FOLDER --steps 400 --device cuda
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

from benchmarks._retriever_data import DATA
from lora_hub_sdk.demo.training._learning import Learner, TrainingLog
from lora_hub_sdk.demo.training._rows import Row
from lora_hub_sdk.demo.training.recipes import BASE_MODEL_ID, Recipe
from lora_hub_sdk.evaluation.metrics import score
from lora_hub_sdk.evaluation.mixed_set import MixedRow, read_mixed
from lora_hub_sdk.evaluation.run import LONGEST, LONGEST_ELSE

BASE: Final = "smollm2-135m-instruct"
#: What a folder must have to be complete; the last is written last.
FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "training.json")
_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PROMPT_TOKENS: Final = 180
_STEPS: Final = 60
_RANK: Final = 6
_HELD_OUT: Final = 40


@dataclass(frozen=True, slots=True)
class Training:
    """What all tasks of one call share. ``data`` has a file ``<task>.train.jsonl`` for each."""

    learner: Learner
    recipe: Recipe
    data: Path
    output: Path
    held_out: int = _HELD_OUT
    seed: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not options.data.is_dir():
        print("skipped: the tasks' rows are not beside this checkout, and --data names no folder")
        return
    recipe = Recipe(options.rank, options.alpha or 2 * options.rank, _MODULES, options.steps, options.learning_rate)
    learner = new_learner(options.base, options.device)
    training = Training(learner, recipe, options.data, options.output, options.held_out, options.seed)
    for task in options.task:
        train_task(task, training)


def train_task(task: str, training: Training) -> Path:
    """Train one adapter, unless its folder is complete; returns the folder.

    Raises:
        ConfigurationError: the task's rows cannot be read.
    """
    folder = training.output / task
    if all((folder / name).is_file() for name in FILES):
        print(f"{task}: complete, skipped", flush=True)
        return folder
    training.output.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix=f".{task}-", dir=training.output))
    try:
        told = _train_into(work, task, training)
        shutil.rmtree(folder, ignore_errors=True)
        # Folders for the time being, and safetensors files, are private to their owner.
        for path in (work, *work.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{task}: {told['before']} -> {told['after']} {told['metric']} in {told['seconds']} s", flush=True)
    return folder


def split_rows(rows: Sequence[MixedRow], held_out: int, seed: int) -> tuple[list[MixedRow], list[MixedRow]]:
    """Rows to learn from, and rows to score with; no question is in both."""
    distinct = list({row.inputs: row for row in rows}.values())
    random.Random(f"{seed} {distinct[0].task} held out").shuffle(distinct)
    return distinct[held_out:], distinct[:held_out]


def _train_into(folder: Path, task: str, training: Training) -> dict[str, object]:
    learner, recipe = training.learner, training.recipe
    learned, held_out = split_rows(
        read_mixed(training.data / f"{task}.train.jsonl").rows, training.held_out, training.seed
    )
    before = _score(learner, held_out, None)
    log = learner.train(recipe, [Row(row.inputs, row.targets) for row in learned], seed=training.seed, folder=folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form with nothing filled in
    told = _told(held_out[0], recipe, log) | {
        "before": before,
        "after": _score(learner, held_out, folder),
        "scored_on": f"{len(held_out)} training rows that were held out",
        "train_rows": len(learned),
        "prompt_tokens": _PROMPT_TOKENS,
        "seed": training.seed,
    }
    (folder / FILES[-1]).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return told


def _told(row: MixedRow, recipe: Recipe, log: TrainingLog) -> dict[str, object]:
    """Under the names that the other adapters' files have."""
    return {
        "task": row.task,
        "domain": row.domain,
        "metric": row.metric,
        "steps": recipe.steps,
        "seconds": round(log.seconds),
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "learning_rate": recipe.learning_rate,
        "target_modules": list(recipe.modules),
        "loss0": log.losses[0],
        "loss1": log.losses[-1],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _score(learner: Learner, rows: Sequence[MixedRow], adapter: Path | None) -> float:
    """Mean score in percent."""
    longest = LONGEST.get(rows[0].metric, LONGEST_ELSE)
    asked = [Row(row.inputs, row.targets) for row in rows]
    answers = learner.answer(asked, max_new_tokens=longest, adapter=adapter)
    found = [score(row.metric, answer, row.targets) for row, answer in zip(rows, answers, strict=True)]
    return round(sum(found) / len(found), 1)


def new_learner(base: str, device: str) -> Learner:
    import torch

    from lora_hub_sdk.models import resolve_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = base == BASE
    folder = resolve_model(base).folder if own else Path(base)
    return Learner(folder, base_id=BASE_MODEL_ID if own else base, device=device, prompt_tokens=_PROMPT_TOKENS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.split("\n")[0])
    parser.add_argument("--task", action="append", required=True, help="may be repeated")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="one folder each goes in here")
    parser.add_argument("--data", type=Path, default=DATA / "tasks", metavar="FOLDER", help="has TASK.train.jsonl")
    parser.add_argument("--base", default=BASE, help="the embedded model, or a folder")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--steps", type=int, default=_STEPS, help="of 8 rows each")
    parser.add_argument("--rank", type=int, default=_RANK)
    parser.add_argument("--alpha", type=int, help="twice the rank where not given")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--held-out", type=int, default=_HELD_OUT, help="training rows to score with")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
