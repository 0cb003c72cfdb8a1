"""``lora-hub calibrate``, and ``min_score="auto"`` at every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_lora_hub import LoraRetrieverLLM
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter

DATES = [f"Write {day} {month} 1968 in ISO form" for day in range(2, 8) for month in ("May", "July")]
MOODS = [f"Is this review good or bad? The {what} was {how}" for what in ("food", "room") for how in "abcdef"]


@pytest.fixture
def database(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> Path:
    """Two adapters, and one whose samples were not kept."""
    hub = open_hub()
    hub.register(tiny_adapter(tmp_path / "dates", base), name="dates", samples=DATES, tags=["domain:time"])
    hub.register(tiny_adapter(tmp_path / "moods", base), name="moods", samples=MOODS, tags=["domain:text"])
    hub.register(tiny_adapter(tmp_path / "own", base), name="own", samples=["Ask the oracle"], keep_samples=False)
    hub.close()
    return tmp_path / "hub.db"


def run(database: Path, *args: str) -> tuple[int, Any]:
    """Exit code and JSON of a command."""
    result = CliRunner().invoke(app, [*args, "--database", str(database), "--index", "exact", "--json"])
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)


def test_the_command_tells_the_bound_and_keeps_it_for_generate(database: Path, base: Path) -> None:
    asked = ("generate", "zebra crossing", "--base-model", str(base), "--max-new-tokens", "2", "--min-score", "auto")
    code, data = run(database, *asked)
    assert (code, data["error"]["type"]) == (1, "ConfigurationError")
    assert "lora-hub calibrate" in data["error"]["message"]
    code, data = run(database, "calibrate", "--false-abstain", "0.1")
    assert code == 0
    assert (data["samples"], data["adapters"], data["skipped"], data["false_abstain"]) == (24, 2, 1, 0.1)
    assert -1 < data["min_score"] == data["rule"]["min_score"] <= 1
    assert 0 <= data["by_rule"]["false_route_domain"] <= data["by_rule"]["false_route"] <= 1
    code, data = run(database, *asked)
    assert (code, data[0]["route"]["adapters"]) == (0, [])


def test_people_see_both_bounds_and_what_to_mind(database: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--database", str(database), "--index", "exact"])
    assert result.exit_code == 0, result.output
    for told in ("24 samples of 2 adapters; 1 adapters without", "(auto)", "cosine >=", "note: only 24 samples"):
        assert told in result.stdout


@pytest.mark.parametrize(
    "args", [("calibrate", "--false-abstain", "1.5"), ("generate", "x", "--min-score", "high", "--base-model", "x")]
)
def test_what_makes_no_sense_is_refused(database: Path, args: tuple[str, ...]) -> None:
    code, data = run(database, *args)
    assert (code, data["error"]["type"]) == (1, "ConfigurationError")


def test_langchain_takes_auto_and_its_cache_key_changes_with_the_bound(
    database: Path, base: Path, open_hub: Callable[..., LoraHub]
) -> None:
    hub = open_hub(index="exact")
    llm = LoraRetrieverLLM(hub=hub, base_model=base, min_score="auto", max_new_tokens=2)
    with pytest.raises(ConfigurationError, match="calibrate"):
        llm.invoke("zebra crossing")
    before = llm._identifying_params
    hub.calibrate(false_abstain=0.1)
    assert llm._identifying_params != before
    stranger, known = (llm.generate([text]).generations[0][0] for text in ("zebra crossing", DATES[3]))
    assert stranger.generation_info is not None
    assert stranger.generation_info["route"]["adapters"] == []
    assert known.generation_info is not None
    assert known.generation_info["route"]["adapters"][0]["name"] == "dates"
    with pytest.raises(ConfigurationError, match="min_score"):
        llm.generate(["x"], min_score="high")
