"""Of two adapters that answer differently, the study tells whose answer came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_hub_sdk.errors import AdapterNotFoundError, ConfigurationError
from lora_hub_sdk.evaluation.conflicts import study_conflict
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import MinScore, Routing, Sampling
from tests.encoders import Hashing

PROMPTS = [f"question {n}" for n in range(4)]


@pytest.fixture
def ground(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> Ground:
    """Two adapters of one task; the first is reviewed and measured, and so is another one."""
    hub = open_hub(encoder=Hashing("h"), index="exact")
    samples = {"first": ["question 0", "a"], "second": ["question 1", "b"], "other": ["something else", "c"]}
    for seed, (name, own) in enumerate(samples.items()):
        tags = () if name == "second" else ("reviewed",)
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed, alpha=32), samples=own, name=name, tags=tags)
    hub.record_score("first", "sentiment", "em", 90)
    hub.record_score("other", "sentiment", "em", 80)
    hub.record_score("second", "sentiment", "em", 10)
    return Ground(hub=hub, base_model=base, own={"sentiment": "first"}, folder=tmp_path / "learned")


def told(ground: Ground, name: str) -> list[str]:
    routing = Routing("selection", adapters=(name,))
    found = ground.hub.generate(PROMPTS, base_model=ground.base_model, routing=routing, sampling=Sampling(16))
    return [one.text for one in found]


def test_each_adapters_own_answers_are_told_apart(ground: Ground, tmp_path: Path) -> None:
    exchanged = dict(zip(told(ground, "first"), told(ground, "second"), strict=True))
    assert len(exchanged) == 4
    rows = [MixedRow(text, target, "sentiment", "d", "em") for text, target in zip(PROMPTS, exchanged, strict=True)]
    questions = MixedSet((*rows, MixedRow("else", "not among the labels", "sentiment", "d", "em")))
    found = study_conflict(
        ground, questions, first="first", second="second", exchanged=exchanged, output=tmp_path / "run", k=2
    )
    shares = {name: (one.right.value, one.opposite.value, one.neither) for name, one in found.items()}
    assert shares["first"] == (100, 0, 0)
    assert shares["second"] == (0, 100, 0)
    # The second has question 1 for its sample, the first question 0.
    assert 0 < found["selection"].first_weight < 1
    assert found["both mixed"].first_weight == found["both fused"].second_weight == 0.5
    for name in ("selection", "mixture", "fusion", "gate"):
        assert found[f"{name} without the second"].second_weight == 0
    assert found["first"].as_dict()["right"] == {"value": 100, "low": None, "high": None}


def test_scores_tags_and_names_keep_the_second_one_out_alike(ground: Ground) -> None:
    ways = [
        Routing(exclude=("second",)),
        Routing(tags=("reviewed",)),
        Routing(scores=(MinScore("sentiment", "em", 50),)),
    ]
    routes = [ground.hub.route(PROMPTS, base_model=ground.base_model, routing=way) for way in ways]
    assert routes[0] == routes[1] == routes[2]
    assert all({"first", "other"} == {one.adapter.name for one in route.members} for route in routes[0])


def test_a_study_without_questions_or_without_its_adapters_is_refused(ground: Ground, tmp_path: Path) -> None:
    questions = MixedSet((MixedRow("q", "yes", "sentiment", "d", "em"),))
    options = {"first": "first", "second": "second", "output": tmp_path}
    with pytest.raises(ConfigurationError, match="no question is of a task"):
        study_conflict(ground, questions, exchanged={"no": "yes"}, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no question is of a task"):
        study_conflict(replace(ground, own={}), questions, exchanged={"yes": "no"}, **options)  # type: ignore[arg-type]
    with pytest.raises(AdapterNotFoundError):
        study_conflict(ground, questions, exchanged={"yes": "no"}, **options | {"second": "gone"})  # type: ignore[arg-type]
