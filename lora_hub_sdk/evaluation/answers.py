"""What systems answered, as a file of JSON lines that survives being cut off at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import RouteDict

ANSWERS_FILE: Final = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one question that one system was asked.

    Attributes:
        system: its name.
        question: the place of the question in the set.
        task, domain, metric: of the question.
        text: the answer; None where the system has none to this question, or where there was an error.
        score: by the question's metric, 0 to 100; None without a text.
        scores: by that metric's companions too.
        route: as ``Route.as_dict``; None where the system has no answer.
        key: the same for two answers to one question that are made of the same adapters in the same way.
        finish_reason: "stop" or "length".
        tokens: how many the answer has.
        same_as: the system whose answer this is, where the two routes are equal and it was asked but once.
        error: why there is no text; asked again by the next run.
    """

    system: str
    question: int
    task: str
    domain: str
    metric: str
    text: str | None = None
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    route: RouteDict | None = None
    key: str | None = None
    finish_reason: str | None = None
    tokens: int = 0
    same_as: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As a line holds it: the text is called "answer"."""
        told = asdict(self)
        return {("answer" if name == "text" else name): value for name, value in told.items()}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Answer:
        """From what ``as_dict`` gave; fields that this version does not know are left out."""
        known = {("text" if name == "answer" else name): value for name, value in told.items()}
        return cls(**{name: value for name, value in known.items() if name in cls.__dataclass_fields__})


class AnswerFile:
    """Appends answers; each is in the file as soon as ``append`` returns. A context manager.

    ``known`` are those that were there, by system and question; of two the later. A last line that was cut off is
    taken away.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ANSWERS_FILE
        self.known: dict[tuple[str, int], Answer] = {}
        if path.exists():
            whole = _whole_lines(path)
            self.known = {(one.system, one.question): one for one in _parsed(path, whole)}
            os.truncate(path, len(whole))
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 - closed by close()

    def append(self, answers: Iterable[Answer]) -> None:
        """Keep these, in place of those of the same systems and questions."""
        lines = []
        for one in answers:
            self.known[one.system, one.question] = one
            lines.append(json.dumps(one.as_dict(), ensure_ascii=False) + "\n")
        self._file.write("".join(lines).encode("utf-8", "surrogatepass"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_answers(folder: str | os.PathLike[str]) -> list[Answer]:
    """All answers that a run's folder has, also while it runs; of two to one question and system the later.

    Raises:
        ConfigurationError: there is no file of answers, or a line before the last that is none.
    """
    path = Path(folder) / ANSWERS_FILE
    try:
        whole = _whole_lines(path)
    except OSError as error:
        raise ConfigurationError(f"no answers can be read from {str(path)!r}: {error}") from error
    return list({(one.system, one.question): one for one in _parsed(path, whole)}.values())


def _whole_lines(path: Path) -> bytes:
    """What a kill leaves of a line is not JSON, or has no end."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    while whole:
        at = whole.rfind(b"\n", 0, -1) + 1
        try:
            json.loads(whole[at:])
        except ValueError:
            whole = whole[:at]
        else:
            break
    return whole


def _parsed(path: Path, whole: bytes) -> list[Answer]:
    answers = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            answers.append(Answer.of(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{str(path)!r}, line {number}, is no answer: {error}; take the line out, and it is asked again"
            ) from error
    return answers
