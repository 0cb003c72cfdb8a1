"""The two sets of tasks that the retriever is measured on, read in place: the paper's, and one of other tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.samples import sample_texts
from lora_hub_sdk.retriever.tasks import Task

DATA: Final = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES: Final = 20


@dataclass(frozen=True, slots=True)
class Material:
    """Tasks, the texts that tell what each is, and questions. ``leaked`` of them stand among these texts."""

    name: str
    tasks: tuple[Task, ...]
    questions: tuple[Question, ...]
    leaked: frozenset[int]

    @property
    def clean(self) -> tuple[Question, ...]:
        """The questions that do not."""
        return tuple(asked for place, asked in enumerate(self.questions) if place not in self.leaked)


def material(name: str, tasks: Sequence[Task], questions: Iterable[Question]) -> Material:
    """Tasks in the order of their names, and the questions about them."""
    asked = tuple(questions)
    given = {_plain(text) for task in tasks for text in task.inputs}
    leaked = frozenset(place for place, one in enumerate(asked) if _plain(one.text) in given)
    return Material(name, tuple(sorted(tasks, key=lambda task: task.name)), asked, leaked)


def paper() -> Material:
    """48 adapters of 20 samples, and the 1,197 of the paper's 2,395 questions that are given for development."""
    entries = json.loads((DATA / "paper" / "adapters.json").read_text("utf-8"))
    tasks = [
        Task(name, sample_texts([row["inputs"] for row in entry["sample"]], name), entry["domain"])
        for entry in entries
        for name in [entry["model_name"]]
    ]
    return material("paper", tasks, _asked(_rows(DATA / "paper" / "questions.jsonl")))


def other_tasks(seed: int = 0) -> Material:
    """42 tasks in our own templates: 20 training rows each, drawn by the seed; the test rows are the questions."""
    tasks, questions = [], []
    for name, rows in training_rows().items():
        drawn = random.Random(f"{seed} {name}").sample(rows, SAMPLES)
        domain = next(_rows(DATA / "tasks" / f"{name}.train.jsonl"))["domain"]
        tasks.append(Task(name, sample_texts(drawn, name), domain))
        questions += _asked(_rows(DATA / "tasks" / f"{name}.test.jsonl"))
    return material("tasks", tasks, questions)


def training_rows() -> dict[str, list[str]]:
    """Every training input of the 42 tasks, without repetitions, by task in the order of names."""
    files = sorted((DATA / "tasks").glob("*.train.jsonl"))
    return {file.name.split(".")[0]: list(dict.fromkeys(row["inputs"] for row in _rows(file))) for file in files}


def training_domains() -> dict[str, str]:
    """The domain of each of the 42 tasks."""
    return {entry["task"]: entry["domain"] for entry in json.loads((DATA / "tasks" / "manifest.json").read_text())}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines: JSON may hold U+2028 and the like as they are.
    return (json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip())


def _asked(rows: Iterable[dict[str, Any]]) -> list[Question]:
    return [Question(row["inputs"], row["task"]) for row in rows]


def _plain(text: str) -> str:
    return " ".join(text.split())
