"""The benchmark of the faces on a tiny model: what it promises to measure is what it measures. No timings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks._serve_pool import THEMES, prompts
from benchmarks.serve import PARTS, main
from tests.support import endless_base

SMALL = ["--batch=4", "--new-tokens=6", "--rank=2", "--rounds=1", "--threads=1", "--calls=6", "--at-once=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], base: Path) -> Callable[..., dict[str, Any]]:
    def report(part: str, *options: str) -> dict[str, Any]:
        main(["--json", "--dtype=float32", f"--part={part}", f"--base-model={base}", *SMALL, *options])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
        found: dict[str, Any] = json.loads(line)
        return found

    return report


def test_no_two_prompts_are_the_same_and_all_themes_come() -> None:
    asked = prompts(64)
    assert len(set(asked)) == 64
    assert all(any(theme in prompt for prompt in asked) for theme in THEMES)


def test_langchain_answers_what_the_engine_answers(run: Callable[..., dict[str, Any]]) -> None:
    found = run("langchain")
    assert found["settings"]["tokens"] == 4 * 6
    assert {name: one["rows_equal"] for name, one in found["agree"].items()} == {
        "LoraRetrieverLLM == engine": 4,
        "ChatLoraRetriever == engine": 4,
    }
    assert sum("asked" in ratio for ratio in found["ratios"].values()) == 3


def test_batches_are_counted_for_every_way_of_calling(run: Callable[..., dict[str, Any]]) -> None:
    found = run("batches")["systems"]
    assert len(found) == 2 * 8
    assert all(1 <= one["engine batches"] <= 6 for one in found.values())
    for model in ("LoraRetrieverLLM", "ChatLoraRetriever"):
        assert found[f"{model}: batch"]["engine batches"] == 1


@pytest.mark.slow
def test_a_server_of_its_own_answers_what_the_hub_answers(run: Callable[..., dict[str, Any]]) -> None:
    found = run("http")
    assert found["agree"]["HTTP == hub"] == {"rows_equal": 4, "rows": 4}
    waits = run("first_token", "--long-tokens=1500")["systems"]
    assert len(waits) == 4
    assert PARTS.keys() == {"langchain", "batches", "http", "first_token"}
