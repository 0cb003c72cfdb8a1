"""``lora-hub eval-retriever`` on tiny data, with the real encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter

SAMPLES = {
    "dates": ["Write 3 May 1968 in ISO form", "Give the date 1 June 2001 as YYYY-MM-DD"],
    "moods": ["Is this review positive or negative? I loved it", "Sentiment of: the food was awful"],
    "sums": ["What is 12 plus 30?", "Add 5 and 19 and tell the sum"],
}
ASKED = [
    ("Write 9 July 1999 in ISO form", "dates"),
    ("Is this review positive or negative? A dull film", "moods"),
    ("What is  12 plus 30?", "sums"),
    ("What is 4 plus 44?", "sums"),
]


def lines(file: Path, rows: list[Any]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return str(file)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return lines(tmp_path / "questions.jsonl", [{"inputs": text, "task": task} for text, task in ASKED])


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    rows = [{"task": task, "inputs": texts, "domain": task[:1]} for task, texts in SAMPLES.items()]
    return lines(tmp_path / "tasks.jsonl", rows)


def run(database: Path, *args: str) -> tuple[int, Any]:
    """Exit code and JSON of the command."""
    result = CliRunner().invoke(app, ["eval-retriever", *args, "--database", str(database), "--offline", "--json"])
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)


def test_a_file_of_tasks_needs_no_registry_and_makes_none(tmp_path: Path, questions: str, tasks: str) -> None:
    (tmp_path / "more.txt").write_text("sums\n")
    args = ("--questions", questions, "--tasks", tasks, "--trained", "dates", "--trained", str(tmp_path / "more.txt"))
    code, data = run(tmp_path / "none.db", *args)
    assert code == 0, data
    assert (data["tasks"], data["questions"], data["leaked"], data["trained"]) == (3, 4, 1, ["dates", "sums"])
    assert data["clean"]["all"]["top"]["1"]["value"] == 1.0
    assert {name: group["count"] for name, group in data["clean"].items()} == {"all": 3, "seen": 2, "unseen": 1}
    assert (data["encoder"], data["reranked"], data["figures"]) == (
        "sentence-transformers/all-MiniLM-L6-v2",
        False,
        [],
    )
    assert not (tmp_path / "none.db").exists()


def test_the_registrys_own_samples_are_searched_and_people_see_the_papers_numbers(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path, questions: str
) -> None:
    hub = open_hub(index="exact")
    for name, texts in SAMPLES.items():
        hub.register(tiny_adapter(tmp_path / name, base), name=name, samples=texts)
    hub.close()
    args = ["eval-retriever", "--questions", questions, "--database", str(tmp_path / "hub.db"), "--offline", "--rerank"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "all-MiniLM-L6-v2, reranked, all" in result.stdout
    assert "paper: LoraRetriever, 40 % of tasks" in result.stdout


def test_figures_are_written_and_named(tmp_path: Path, questions: str, tasks: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "figures"
    code, data = run(tmp_path / "none.db", "--questions", questions, "--tasks", tasks, "--figures", str(folder))
    assert code == 0, data
    assert {Path(file).name for file in data["figures"]} == {file.name for file in folder.iterdir()}
    assert len(data["figures"]) == 4


def test_what_cannot_be_evaluated_is_told(tmp_path: Path, questions: str, tasks: str) -> None:
    def error(*args: str) -> str:
        code, data = run(tmp_path / "none.db", *args)
        assert code == 1
        return f"{data['error']['type']}: {data['error']['message']}"

    assert "'none.db' does not exist" in error("--questions", questions).replace(f"{tmp_path}/", "")
    assert "ConfigurationError: samples" in error("--questions", str(tmp_path / "missing.jsonl"), "--tasks", tasks)
    unknown = lines(tmp_path / "unknown.jsonl", [{"inputs": "x", "task": "date"}])
    assert "did you mean 'dates'" in error("--questions", unknown, "--tasks", tasks)
    assert "ModelNotFoundError" in error("--questions", questions, "--tasks", tasks, "--encoder", "no/such")
    nameless = lines(tmp_path / "nameless.jsonl", ["dates", {"inputs": "x"}])
    assert "row 2: expected a name" in error("--questions", questions, "--tasks", tasks, "--trained", nameless)
    assert "no report of a training" in error("--questions", questions, "--tasks", tasks, "--trained", str(tmp_path))
