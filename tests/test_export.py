"""``hub.export`` and ``lora-hub export``: routes of prompts and named adapters, as adapters of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.errors import AdapterNotFoundError, RetiredError, UnknownStrategyError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing.tiny import tiny_adapter
from lora_hub_sdk.types import Adapter, Routing, Sampling
from tests.conftest import SHARED
from tests.support import relative_error, route_of

SPECS: dict[str, dict[str, Any]] = {
    "dates": {"rank": 3, "seed": 1},
    "moods": {"rank": 5, "seed": 2, "modules": ("q_proj", "down_proj"), "rslora": True},
    "sums": {"rank": 2, "seed": 3, "rank_pattern": {"q_proj": 6}},
}
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture
def stocked(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    for name, spec in SPECS.items():
        hub.register(tiny_adapter(tmp_path / name, base, **spec), name=name, samples=[f"{name} one", f"{name} two"])
    return hub


def test_the_route_of_a_completion_answers_the_same_as_one_adapter(
    stocked: LoraHub, base: Path, tmp_path: Path
) -> None:
    prompts = ["dates one?", "some sums two"]
    before = stocked.generate(prompts, base_model=base, routing=Routing(weights="similarity"), sampling=SHORT)
    for place, completion in enumerate(before):
        exported = stocked.export(completion.trace.route, tmp_path / f"out-{place}")
        again = stocked.register(exported.path, name=f"one-{place}", samples=["x"], base_model=base)
        assert (again.digest, again.rank) == (exported.digest, exported.rank)
        alone = Routing("selection", adapters=(again.name,))
        (after,) = stocked.generate([prompts[place]], base_model=base, routing=alone, sampling=SHORT)
        assert after.text == completion.text


def test_names_and_weights_are_a_route_too(stocked: LoraHub, tmp_path: Path) -> None:
    found = stocked.export({"dates": 0.75, "moods": 0.25}, tmp_path / "a")
    route = route_of("mixture", (stocked.get("dates"), 0.75), (stocked.get("moods"), 0.25))
    assert stocked.export(route, tmp_path / "b").digest == found.digest
    assert stocked.export({"dates": 0.75, "moods": 0.25}, tmp_path / "c", strategy="fusion").rank == 5


def test_names_that_cannot_be_used_are_refused(stocked: LoraHub, tmp_path: Path) -> None:
    stocked.retire("moods")
    for names, strategy, error in (
        ({"dates": 1.0, "date": 1.0}, "mixture", AdapterNotFoundError),
        ({"dates": 1.0, "moods": 1.0}, "mixture", RetiredError),
        ({"dates": 1.0}, "mix", UnknownStrategyError),
    ):
        with pytest.raises(error):
            stocked.export(names, tmp_path / "out", strategy=strategy)
    assert not (tmp_path / "out").exists()


def run(database: Path, *args: str) -> Any:
    result = CliRunner().invoke(app, ["export", *args, "--database", str(database), "--index", "exact", "--json"])
    assert "Traceback" not in result.output
    return json.loads(result.stdout)


def test_the_command_saves_a_prompt_s_route_or_named_adapters(stocked: LoraHub, base: Path, tmp_path: Path) -> None:
    database = tmp_path / "hub.db"
    found = run(database, "sums two", "--output", str(tmp_path / "a"), "-k", "2", "--base-model", str(base))
    assert found["path"] == str(tmp_path / "a")
    assert found["route"]["adapters"][0]["name"] == "sums"
    assert found["rank"] == found["exact_rank"]
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size == found["size_bytes"]
    named = run(database, "--adapter", "dates", "--adapter", "sums", "--output", str(tmp_path / "b"), "--rank", "2")
    assert (named["rank"], named["exact_rank"]) == (2, 9)
    assert 0.01 < named["relative_error"] <= named["largest_error"] < 1.0
    weighed = run(database, "--adapter", "dates=0.5", "--adapter", "sums=0.5", "--output", str(tmp_path / "c"))
    equal = run(database, "--adapter", "dates", "--adapter", "sums", "--output", str(tmp_path / "d"))
    assert weighed["digest"] == equal["digest"]


def test_the_command_says_what_it_cannot_do(stocked: LoraHub, tmp_path: Path) -> None:
    database, output = tmp_path / "hub.db", ("--output", str(tmp_path / "a"))
    for args, why in (
        ((), "give a prompt"),
        (("a prompt", "--adapter", "dates"), "give a prompt"),
        (("--adapter", "dates=0.5", "--adapter", "sums"), "give each a weight"),
        (("--adapter", "dates=0.5", "--adapter", "dates=0.5"), "twice"),
        (("--adapter", "no=such"), "no adapter 'no=such'"),
        (("--adapter", "dates", "--rank", "0"), "rank=0"),
    ):
        assert why in run(database, *args, *output)["error"]["message"]
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_real_adapters_as_one_are_what_they_are_together(
    open_hub: Callable[..., LoraHub], shared: Path, tmp_path: Path
) -> None:
    """Of rank 6, 8, 16 and 4, with and without rsLoRA, on SmolLM2-135M: PEFT's logits and tokens are the engine's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.request import Request
    from tests.engine.test_exactness import Passes

    folder = resolve_model("smollm2-135m-instruct").folder
    hub = open_hub(offline=True)
    members: list[tuple[Adapter, float]] = []
    for name, weight in {"sst2": 0.4, "glue_mrpc": 0.3, "dart": 0.2, "ddtp_enit": 0.1}.items():
        adapter = hub.register(shutil.copytree(SHARED / "adapters" / name, tmp_path / name), name=name, samples=[name])
        members.append((adapter, weight))
    engine = hub.engine("smollm2-135m-instruct", ModelSettings("float32"))
    passes = Passes(engine.base)
    prompt = "Is this review positive or negative? The plot was thin, but I laughed all the way."
    ids = torch.tensor([passes.ids(prompt)])
    for strategy in ("mixture", "fusion"):
        route = route_of(strategy, *members)
        exported = hub.export(route, tmp_path / strategy)
        assert exported.relative_error < 2e-7
        model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / strategy
        )
        with torch.inference_mode():
            logits = model(ids).logits[0, -1]
            tokens = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )[0, ids.shape[1] :]
        expected = passes.logits([prompt, "neighbour"], [route, route_of("base")])[0]
        assert relative_error(logits, expected) < 1e-4
        row = route_of("selection", (hub.register(exported.path, name=strategy, samples=["x"]), 1.0))
        again = passes.logits([prompt, "neighbour"], [row, route_of("base")])[0]
        assert relative_error(again, expected) < 1e-4
        (answer,) = engine.generate([Request(prompt, route, Sampling(max_new_tokens=16))])
        assert engine.base.tokenizer.decode(tokens, skip_special_tokens=True) == answer.text
