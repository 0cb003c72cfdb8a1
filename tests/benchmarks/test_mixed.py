from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import _zoo, mixed
from lora_hub_sdk.evaluation.answers import read_answers
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from tests.benchmarks.zoos import small_zoo as small_zoo


@pytest.fixture
def command(
    small_zoo: Path, base: Path, encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Three systems on the tiny zoo."""
    monkeypatch.setattr(mixed, "BASE", str(base))
    monkeypatch.setattr(mixed, "LoraHub", partial(LoraHub, encoder=encoder))
    return ["--output", str(tmp_path / "run"), "--systems", "base, perfect,mixture", "--per-task", "3", "--json"]


def test_one_command_makes_the_table_and_goes_on_from_what_is_there(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed.main(command)
    report = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in report["systems"]] == ["base", "perfect", "mixture"]
    assert (report["questions"], report["adapters"]) == (6, 2)
    assert report["told"]["command"].startswith("python -m benchmarks.mixed --output")
    assert (tmp_path / "run" / "report.md").is_file()
    before = (tmp_path / "run" / "answers.jsonl").read_bytes()
    mixed.main(command)
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == before
    again = json.loads(capsys.readouterr().out)
    assert [one["overall"] for one in again["systems"]] == [one["overall"] for one in report["systems"]]
    assert again["generated"] == report["generated"]


def test_tasks_that_nobody_was_trained_for_are_asked_on_request(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed.main([*command, "--all-tasks"])
    report = json.loads(capsys.readouterr().out)
    perfect = next(one for one in report["systems"] if one["name"] == "perfect")
    assert (report["questions"], report["adapters"]) == (9, 2)
    assert (perfect["answered"], perfect["without"]) == (6, 3)
    texts = {one.system: one.text for one in read_answers(tmp_path / "run") if one.task == "three"}
    assert texts["perfect"] is None
    assert texts["mixture"] is not None


@pytest.mark.slow
def test_curves_and_figures_come_with_it(command: list[str], tmp_path: Path) -> None:
    mixed.main([*command, "--curves", "--figures"])
    drawn = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"systems.png", "quality_by_k.png", "similarity.png"} <= drawn
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [one["name"] for one in report["systems"]] == ["base", "perfect", "mixture"]


def test_it_is_skipped_where_there_is_no_zoo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_zoo, "ADAPTERS", tmp_path / "none")
    mixed.main(["--output", str(tmp_path / "run")])
    assert "skipped" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
