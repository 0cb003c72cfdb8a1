"""The zoo: real adapters in a hub, the questions of their tasks, and the rows that systems may learn from.

Each adapter is named as its task, tagged with the task's cluster, and told by 20 training rows. Systems learn from the
same rows and no others, so nobody knows more of a task than the retriever does. Test rows are asked, and only asked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks._retriever_data import DATA, SAMPLES
from lora_hub_sdk import LoraHub
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet, read_mixed

ADAPTERS: Final = DATA.parent / "adapters"
TASKS: Final = DATA / "tasks"


def zoo_folders(folders: Iterable[Path] = ()) -> dict[str, Path]:
    """The folder of each task's adapter: of those beside this checkout first, then of further folders of adapters.

    A folder counts where it has what PEFT saves and there are rows of a task of its name.
    """
    found: dict[str, Path] = {}
    for parent in (ADAPTERS, *folders):
        for config in sorted(parent.glob("*/adapter_config.json")):
            task = config.parent.name
            complete = (config.parent / "adapter_model.safetensors").is_file()
            if complete and _file(task, "train").is_file():
                found.setdefault(task, config.parent)
    return dict(sorted(found.items()))


def register_zoo(
    hub: LoraHub, folders: Iterable[Path] = (), *, seed: int = 0, progress: bool = False
) -> dict[str, str]:
    """Register every adapter of the zoo with 20 training rows of its task; those that are there change nothing.

    Args:
        folders: of adapters, each in a folder that has its task's name; beside those of this checkout.
        seed: of the rows that are drawn.

    Returns:
        The name of each task's own adapter.

    Raises:
        LoraHubError: an adapter was not admitted.
    """
    requests: list[dict[str, Any]] = []
    for task, folder in zoo_folders(folders).items():
        drawn = _drawn(task, SAMPLES, seed)
        samples, tags = [row.inputs for row in drawn], [f"domain:{drawn[0].domain}"]
        requests.append({"reference": folder, "name": task, "samples": samples, "tags": tags})
    # One at a time: threads would only share the cores.
    for outcome in hub.register_many(requests, workers=1, progress=progress):
        if outcome.error is not None:
            raise outcome.error
    return {request["name"]: request["name"] for request in requests}


def zoo_training(tasks: Sequence[str], per_task: int = SAMPLES, seed: int = 0) -> MixedSet:
    """Training rows of these tasks: with the numbers as they are, those that their adapters are told by."""
    return MixedSet(tuple(row for task in tasks for row in _drawn(task, per_task, seed)))


def zoo_questions(tasks: Sequence[str], per_task: int = 20, seed: int = 0) -> MixedSet:
    """Test rows of these tasks, all in a random order; none stands among any of their training rows."""
    learned = MixedSet(tuple(row for task in tasks for row in read_mixed(_file(task, "train")).rows))
    asked = MixedSet(tuple(row for task in tasks for row in read_mixed(_file(task, "test")).rows))
    return asked.without(learned).sample(per_task, seed)


def zoo_tasks() -> tuple[str, ...]:
    """Every task that there are rows of, with an adapter or without."""
    manifest = json.loads((TASKS / "manifest.json").read_text("utf-8"))
    return tuple(sorted(entry["task"] for entry in manifest))


def _drawn(task: str, count: int, seed: int) -> list[MixedRow]:
    """The retriever's draw: of distinct questions, by the seed and the task's name."""
    rows: dict[str, MixedRow] = {}
    for row in read_mixed(_file(task, "train")).rows:
        rows.setdefault(row.inputs, row)
    return [rows[text] for text in random.Random(f"{seed} {task}").sample([*rows], count)]


def _file(task: str, part: str) -> Path:
    return TASKS / f"{task}.{part}.jsonl"
