from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.questions import Question, read_questions


def test_lines_become_questions_and_other_fields_are_ignored(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"inputs": "Is it\\nso?", "task": "nli", "targets": "yes", "domain": "x"}\n\n', "utf-8")
    assert read_questions(file) == [Question("Is it\nso?", "nli")]


def test_the_papers_questions_are_read(shared: Path) -> None:
    found = read_questions(shared / "data" / "paper" / "questions.jsonl")
    assert len(found) == 1197
    assert len({question.task for question in found}) == 48


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('"a text"', "expected an object"),
        (json.dumps({"task": "a"}), '"inputs" holds no text'),
        (json.dumps({"inputs": "secret words", "task": 3}), '"task" names no task'),
        (json.dumps({"inputs": " \n", "task": "a"}), '"inputs" holds no text'),
        ("{", "no JSON"),
    ],
)
def test_a_line_of_another_form_is_told_by_its_number(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"inputs": "fine", "task": "a"}\n' + line, "utf-8")
    with pytest.raises(ConfigurationError, match=told) as caught:
        read_questions(file)
    assert "2" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_without_questions_or_none_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigurationError, match="no row"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
