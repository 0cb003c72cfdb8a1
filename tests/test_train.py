"""``lora-hub train-retriever``: from a registry, and on to searching with what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter, tiny_encoder


def test_the_registrys_adapters_train_an_encoder_that_it_is_then_searched_with(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    tiny = tiny_encoder(tmp_path / "encoder")
    hub = open_hub(encoder=tiny, index="exact")
    for number, asked in enumerate(("Translate {} to French", "The plural of {}", "Is {} good or bad?")):
        samples = [asked.format(word) for word in ("oak", "lamp", "stone", "paper")]
        hub.register(tiny_adapter(tmp_path / str(number), base, seed=number), base_model=base, samples=samples)
    before = hub.encoder.fingerprint
    hub.close()
    command = ["train-retriever", str(tmp_path / "out"), "--encoder", str(tiny), "--steps", "3", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--switch", "--database", str(tmp_path / "hub.db"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["steps"], told["texts"], told["switched"], len(told["trained"])) == (3, 12, 3, 3)
    followed = open_hub(index="exact", encoder=None)
    assert followed.encoder.fingerprint == told["fingerprint"] != before
    assert followed.search("Translate lamp to French")[0].relevance is not None


def test_people_read_how_it_went_and_where_the_folder_is(tmp_path: Path) -> None:
    rows = [{"task": task, "inputs": [f"{task} {word}" for word in "abc"]} for task in ("one", "two", "three", "four")]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = tiny_encoder(tmp_path / "encoder")
    command = ["train-retriever", str(tmp_path / "out"), "--tasks", str(tmp_path / "tasks.jsonl"), "--steps", "2"]
    result = CliRunner().invoke(app, [*command, "--encoder", str(tiny), "--fraction", "0.5"])
    assert result.exit_code == 0, result.output
    for said in ("trained on 6 texts of 2 adapters", "step 2 of 2", "never seen find their own adapter", str(tmp_path)):
        assert said in result.stdout
    refused = CliRunner().invoke(app, [*command, "--switch"])
    assert refused.exit_code == 2
