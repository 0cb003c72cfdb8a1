"""All that a run left in its folder, read back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from lora_hub_sdk.composition.tensor_file import write_whole
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.answers import Answer, read_answers
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.record import RunRecord

QUESTIONS_FILE: Final = "questions.jsonl"


@dataclass(frozen=True, slots=True)
class Results:
    """What was asked, what was answered, and how that went."""

    folder: Path
    questions: MixedSet
    answers: tuple[Answer, ...]
    record: RunRecord

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Results:
        """What ``run`` wrote, also while it runs.

        Raises:
            ConfigurationError: the folder is not that of a run, or its files do not belong together.
        """
        path = Path(folder)
        record = RunRecord.read(path)
        questions = _read_questions(path / QUESTIONS_FILE)
        if questions.digest != record.about.get("questions"):
            raise ConfigurationError(
                f"{str(path / QUESTIONS_FILE)!r} was changed after the run; its answers are to other questions"
            )
        return cls(path, questions, tuple(read_answers(path)), record)

    @property
    def errors(self) -> tuple[Answer, ...]:
        """Those without an answer that the next run asks again."""
        return tuple(one for one in self.answers if one.error is not None)


def write_questions(questions: MixedSet, folder: Path) -> None:
    """Keep the questions beside their answers."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in questions.rows)
    write_whole(folder / QUESTIONS_FILE, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))


def _read_questions(path: Path) -> MixedSet:
    """What ``write_questions`` wrote, also rows that no file of questions may have, as blank ones."""
    try:
        return MixedSet(tuple(MixedRow(**json.loads(line)) for line in path.read_bytes().splitlines()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"the questions of the run cannot be read from {str(path)!r}: {error}") from error
