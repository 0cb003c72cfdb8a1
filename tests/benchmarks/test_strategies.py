"""The studies' command: what it makes and shows. No timings, and no training of a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import strategies
from lora_hub_sdk.evaluation.mixed_set import read_mixed


def test_it_is_skipped_where_there_are_no_adapters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strategies, "ADAPTERS", tmp_path / "none")
    strategies.main(["--json", "--output", str(tmp_path)])
    assert "skipped" in capsys.readouterr().out


def test_each_part_is_shown_with_its_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = {"value": 51.26, "low": 40.0, "high": None}
    crowding = {"quality": {"value": 7.0, "low": 6.0, "high": 8.0}, "crowded": 0.5}
    pairs = [{"first": "a", "second": "b", "cosine": 0.987654}]
    speeds = [{"system": "fusion", "batch": 8, "tokens_per_s": 31.4159, "of_single": 0.875}]
    parts: dict[str, tuple[dict[str, Any], list[str]]] = {
        "growth": (
            {"quality": {"mixture": {"4": score}}, "perfect": score, "own_first": {"4": 0.75}},
            ["51.3", "0.750"],
        ),
        "conflict": ({"systems": {"both mixed": {"right": score, "neither": 12.5}}}, ["both mixed", "12.500"]),
        "duplicates": (
            {"groups": {"copied": {"mixture": crowding}}, "near_duplicates": pairs},
            ["7.0 (6.0 to 8.0)", "a, b", "0.988"],
        ),
        "throughput": ({"speeds": speeds}, ["31.4 (0.88)"]),
    }
    assert parts.keys() == strategies.PARTS.keys()
    monkeypatch.setenv("COLUMNS", "200")
    for part, (found, expected) in parts.items():
        strategies.show(part, {"machine": {}, "settings": {}, **found})
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected)


def test_the_contradicting_adapter_learns_the_same_rows_with_the_other_label(shared: Path) -> None:
    given = strategies.opposite_rows()
    rows = read_mixed(shared / "data" / "tasks" / "sst2.train.jsonl").rows
    assert [one.inputs for one in given] == [one.inputs for one in rows]
    assert {(one.targets, other.targets) for one, other in zip(rows, given, strict=True)} == {
        ("positive", "negative"),
        ("negative", "positive"),
    }
