"""``hub.fit_weights``, ``lora-hub fit-weights``, and what is learned at every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_lora_hub import LoraRetrieverLLM
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.composition.weighting import LEARNED, WeightRule
from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from lora_hub_sdk.types import Route, Routing
from tests.encoders import Hashing

TASKS = {
    "dates": [f"Write {day} {month} 1968 in ISO form" for day in range(2, 8) for month in ("May", "July")],
    "moods": [f"Is this review good or bad? The {what} was {how}" for what in ("food", "room") for how in "abcdef"],
    "sums": [f"What is {first} plus {second}?" for first in range(3, 9) for second in (12, 40)],
}


@pytest.fixture
def pool(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> LoraHub:
    """Three adapters, and one whose samples were not kept."""
    hub = open_hub(index="exact")
    for seed, (name, samples) in enumerate(TASKS.items()):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed), name=name, samples=samples)
    hub.register(
        tiny_adapter(tmp_path / "own", base, seed=9), name="own", samples=["Ask the oracle"], keep_samples=False
    )
    return hub


def routed(hub: LoraHub, base: Path, weights: str, prompt: str = TASKS["dates"][3]) -> Route:
    (route,) = hub.route([prompt], base_model=base, routing=Routing(weights=weights))
    return route


@pytest.mark.parametrize("weights", LEARNED)
def test_weights_that_nobody_learned_are_refused_and_learned_ones_serve_another_process(
    weights: str, pool: LoraHub, base: Path, open_hub: Callable[..., LoraHub]
) -> None:
    with pytest.raises(ConfigurationError, match=r"hub\.fit_weights\(\) or lora-hub fit-weights"):
        routed(pool, base, weights)
    found = pool.fit_weights()
    assert (found.rows, found.adapters, found.skipped) == (36, 3, 1)
    route = routed(open_hub(index="exact"), base, weights)
    first = route.members[0]
    assert first.adapter.name == "dates"
    assert first.weight > 0.8
    assert sum(member.weight for member in route.members) == pytest.approx(1)
    assert all(member.weight > 0 for member in route.members)
    assert len(route.members) == (3 if weights == "fitted" else 1)
    assert pool.events(limit=1)[0].action == "weighed"


def test_routes_have_the_weights_that_the_rule_says(pool: LoraHub, base: Path) -> None:
    rule = pool.fit_weights().rule
    prompt = "Write: is 12 plus 3 good or bad in ISO form?"
    hits = pool.search(prompt, 3)
    (expected,) = rule.weights("fitted", [[hit.score for hit in hits]], [])
    assert [member.weight for member in routed(pool, base, "fitted", prompt).members] == pytest.approx(list(expected))


def test_what_was_learned_for_one_encoder_or_namespace_serves_no_other(
    pool: LoraHub, base: Path, open_hub: Callable[..., LoraHub], tmp_path: Path
) -> None:
    pool.fit_weights()
    other = open_hub(database=":memory:", index="exact", encoder=Hashing("other"))
    rule = WeightRule(1.0, 1.0, 1.0, 1.0, 0.0, 0.0).as_text()
    other._registry.keep_rule("weights", "default", pool.encoder.fingerprint, rule)
    other._registry.keep_rule("weights", "elsewhere", other.encoder.fingerprint, rule)
    other.register(tiny_adapter(tmp_path / "one", base), name="one", samples=TASKS["sums"])
    with pytest.raises(ConfigurationError, match="none were learned for namespace 'default' with encoder 'other'"):
        routed(other, base, "fitted")


def test_what_was_learned_while_the_encoder_is_switched_is_not_used_on_its_scores(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    """The encoder changes between reading the rule and searching; the weights must be those of the new one."""
    old, new = Hashing("old"), Hashing("new")
    hub = open_hub(database=":memory:", index="exact", encoder=None)
    hub._encoder.follow(old)
    for name, samples in TASKS.items():
        hub.register(tiny_adapter(tmp_path / name, base), name=name, samples=samples)
    flat, steep = WeightRule(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), WeightRule(900.0, 900.0, 900.0, 0.0, 0.0, 0.0)
    hub._registry.keep_rule("weights", "default", old.fingerprint, steep.as_text())
    hub._registry.keep_rule("weights", "default", new.fingerprint, flat.as_text())
    search, switched = hub._retriever.search_many, list[bool]()

    def switching(*args: Any) -> Any:
        if not switched:
            switched.append(True)
            hub.switch_encoder(new)
        return search(*args)

    hub._retriever.search_many = switching  # type: ignore[method-assign, assignment]
    assert [member.weight for member in routed(hub, base, "fitted").members] == pytest.approx([1 / 3] * 3)


def test_adapters_for_another_base_compete_with_none(pool: LoraHub, tmp_path: Path) -> None:
    alone = pool.fit_weights()
    far = tiny_base(tmp_path / "far")
    pool.register(tiny_adapter(tmp_path / "f1", far), name="far dates", samples=TASKS["dates"])
    both = pool.fit_weights()
    assert (both.adapters, both.rows) == (4, 48)
    assert both.rule == alone.rule


def test_questions_are_learned_from_and_unknown_adapters_refused(pool: LoraHub) -> None:
    found = pool.fit_weights(questions=[Question("Add 3 and 9", "sums")], k=2)
    assert (found.rows, found.k) == (37, 2)
    with pytest.raises(ConfigurationError, match="'own'"):
        pool.fit_weights(questions=[Question("Ask", "own")])
    with pytest.raises(ConfigurationError, match="k=0"):
        pool.fit_weights(k=0)


def test_one_adapter_alone_teaches_nothing(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    hub.register(tiny_adapter(tmp_path / "one", base), name="one", samples=TASKS["sums"])
    with pytest.raises(SamplesError, match="two or more"):
        hub.fit_weights()


def test_named_adapters_take_the_weights_that_are_given(pool: LoraHub, base: Path) -> None:
    def members(*weights: float) -> list[tuple[str, float]]:
        routing = Routing(adapters=("sums", "dates"), adapter_weights=weights)
        (route,) = pool.route(["x"], base_model=base, routing=routing)
        return [(member.adapter.name, member.weight) for member in route.members]

    assert members(0.7, 0.3) == [("sums", 0.7), ("dates", 0.3)]
    assert members(1, -0.5) == [("sums", 1.0), ("dates", -0.5)]
    assert members(0, 2) == [("dates", 2.0)]


def run(hub: LoraHub, *args: str) -> tuple[int, Any]:
    """Exit code and JSON of a command on the hub's database."""
    place = hub._registry._engine.url.database
    result = CliRunner().invoke(app, [*args, "--database", str(place), "--index", "exact", "--json"])
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)


def test_the_command_tells_every_weighting_and_generate_takes_them(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    asked = ("generate", TASKS["dates"][0], "--base-model", str(base), "--max-new-tokens", "2", "--weights", "gate")
    code, data = run(pool, *asked)
    assert (code, data["error"]["type"]) == (1, "ConfigurationError")
    (tmp_path / "asked.jsonl").write_text('{"inputs": "Add 3 and 9", "task": "sums"}\n')
    code, data = run(pool, "fit-weights", "--questions", str(tmp_path / "asked.jsonl"))
    assert code == 0
    assert (data["rows"], data["adapters"], data["skipped"]) == (37, 3, 1)
    assert list(data["scores"]) == ["uniform", "similarity", *LEARNED]
    code, data = run(pool, *asked)
    assert (code, data[0]["route"]["adapters"][0]["name"]) == (0, "dates")


def test_people_see_a_table(pool: LoraHub) -> None:
    place = str(pool._registry._engine.url.database)
    result = CliRunner().invoke(app, ["fit-weights", "--database", place, "--index", "exact"])
    assert result.exit_code == 0, result.output
    for told in ("36 searches of 3 adapters", "1 adapters without kept", "sparse", "gate", "note: only 36 samples"):
        assert told in result.stdout


def test_langchain_takes_them_and_its_cache_key_changes_with_the_fit(pool: LoraHub, base: Path) -> None:
    llm = LoraRetrieverLLM(hub=pool, base_model=base, weights="sparse", max_new_tokens=2)
    with pytest.raises(ConfigurationError, match="fit_weights"):
        llm.invoke(TASKS["moods"][0])
    keys = [llm._identifying_params]
    for k in (2, 3):
        pool.fit_weights(k=k)
        keys.append(llm._identifying_params)
    assert len({json.dumps(key, default=str) for key in keys}) == 3
    told = llm.generate([TASKS["moods"][0]]).generations[0][0].generation_info
    assert told is not None
    assert told["route"]["adapters"][0]["name"] == "moods"
    pinned = llm.generate(["x"], adapters=["sums", "dates"], adapter_weights=[0.7, 0.3]).generations[0][0]
    assert pinned.generation_info is not None
    assert [one["weight"] for one in pinned.generation_info["route"]["adapters"]] == [0.7, 0.3]
    with pytest.raises(ConfigurationError, match="adapter_weights"):
        LoraRetrieverLLM(hub=pool, base_model=base, adapters=("sums",), adapter_weights=(0.5, 0.5))
