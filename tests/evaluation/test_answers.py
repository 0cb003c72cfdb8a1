"""The file of answers, cut off at every place where a kill could."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.answers import ANSWERS_FILE, Answer, AnswerFile, read_answers

FIRST = Answer(
    "mixture",
    0,
    "french",
    "translation",
    "bleu",
    text="l'été\u2028\n| \ud800",
    score=12.5,
    scores={"bleu": 12.5},
    route={"strategy": "mixture", "adapters": []},
    key="k",
    finish_reason="stop",
    tokens=4,
)
SECOND = Answer("base", 1, "plural", "grammar", "em", error="NoAdaptersError: nothing is there")


def written(folder: Path, *answers: Answer) -> Path:
    with AnswerFile(folder) as file:
        file.append(answers)
    return folder / ANSWERS_FILE


def test_an_answer_comes_back_as_it_was_written(tmp_path: Path) -> None:
    line, _ = written(tmp_path, FIRST, SECOND).read_bytes().splitlines()
    assert read_answers(tmp_path) == [FIRST, SECOND]
    assert json.loads(line)["answer"] == FIRST.text


def test_of_two_answers_to_one_question_the_later_counts(tmp_path: Path) -> None:
    again = Answer("base", 1, "plural", "grammar", "em", text="ok", score=0.0)
    written(tmp_path, FIRST, SECOND)
    written(tmp_path, again)
    assert read_answers(tmp_path) == [FIRST, again]
    with AnswerFile(tmp_path) as file:
        assert file.known == {("mixture", 0): FIRST, ("base", 1): again}


def test_a_last_line_that_was_cut_anywhere_is_dropped_and_the_next_begins_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, SECOND, FIRST)
    whole = path.read_bytes()
    first_ends = whole.index(b"\n") + 1
    for end in (*range(first_ends, len(whole), 23), len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read_answers(tmp_path) == [SECOND]
        written(tmp_path, FIRST)
        assert path.read_bytes() == whole


def test_a_last_line_of_zeros_is_dropped_too(tmp_path: Path) -> None:
    path = written(tmp_path, SECOND)
    with path.open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    assert read_answers(tmp_path) == [SECOND]


def test_a_damaged_line_among_others_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, SECOND, FIRST)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"{\n", b"3\n", b'{"system": "base"}\n'):
        path.write_bytes(damaged + lines[1])
        with pytest.raises(ConfigurationError, match=r"answers.jsonl', line 1, is no answer"):
            read_answers(tmp_path)


def test_a_folder_without_answers_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no answers can be read"):
        read_answers(tmp_path)


def test_fields_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, SECOND)
    path.write_text(json.dumps({**SECOND.as_dict(), "weather": "fine"}) + "\n")
    assert read_answers(tmp_path) == [SECOND]
