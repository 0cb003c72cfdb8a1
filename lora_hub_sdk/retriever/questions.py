"""Questions that a retriever is measured with: a prompt, and the task whose adapter should be found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.samples import read_samples


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the name of the task that it is of."""

    text: str
    task: str


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Questions from JSON lines of ``{"inputs", "task"}``; other fields are ignored.

    Raises:
        ConfigurationError: the file cannot be read, holds no line, or a line is not what it should be, which is told by
            its number and never by its content.
    """
    name = os.fspath(path)
    found = [_question(row, f"questions {name!r}, row {number}") for number, row in enumerate(read_samples(path), 1)]
    if not found:
        raise ConfigurationError(f'questions {name!r} hold no row; expected {{"inputs", "task"}} in each line')
    return found


def _question(row: object, place: str) -> Question:
    if not isinstance(row, Mapping):
        raise ConfigurationError(f'{place}: expected an object with "inputs" and "task", found a {type(row).__name__}')
    text, task = row.get("inputs"), row.get("task")
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f'{place}: "inputs" holds no text')
    if not isinstance(task, str) or not task.strip():
        raise ConfigurationError(f'{place}: "task" names no task')
    return Question(text, task)
