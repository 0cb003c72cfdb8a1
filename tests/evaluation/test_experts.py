"""Experts of clusters, and the systems whose gates are trained: what they learn from, once, and that they answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.composition.ramole import Ramole
from lora_hub_sdk.engine.answer_losses import AnswerLosses
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.experts import FixedExperts, cluster_experts
from lora_hub_sdk.evaluation.gated import RetrievedGate
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.system import System
from lora_hub_sdk.evaluation.systems import system
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Routing, Sampling
from tests.evaluation.pool import LEARNED, Pool, make_pool, rows_of

SHORT = {"steps": 2, "batch": 2, "validation_rows": 2}
GATED = ("moe-top1", "moe-top3", "moe-soft", "smear", "arrow", "ramole", "ramole-ood")


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = make_pool(tmp_path_factory.mktemp("pool"), base)
    yield made
    made.hub.close()


@pytest.fixture(scope="module")
def ground(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return pool.ground(tmp_path_factory.mktemp("learned"))


def short(name: str) -> System:
    found = system(name)
    assert isinstance(found, FixedExperts | RetrievedGate)
    return replace(found, recipe=SHORT)


def test_an_expert_is_the_own_adapter_of_the_least_loss_on_all_rows_of_its_cluster(ground: Ground) -> None:
    def loss(domain: str, name: str) -> float:
        rows = [(row.inputs, row.targets) for row in ground.training.rows if row.domain == domain]
        each = AnswerLosses(ground.hub, rows, [name], base_model=ground.base_model).of([1.0])
        return sum(each) / len(each)

    own = {
        "translation": ["french", "german"],
        "grammar": ["past", "plural"],
        "sentiment": ["mood"],
        "sound": ["rhyme"],
    }
    want = {domain: min(names, key=lambda name: loss(domain, name)) for domain, names in own.items()}
    assert cluster_experts(ground) == want
    kept = json.loads((ground.folder / "experts.json").read_text())["losses"]
    assert kept["grammar"] == pytest.approx({name: loss("grammar", name) for name in own["grammar"]}, rel=1e-5)


def test_losses_are_measured_once_and_again_on_other_rows(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    of = AnswerLosses.of

    def counted(self: AnswerLosses, *given: Any) -> list[float]:
        measured.append(1)
        return of(self, *given)

    monkeypatch.setattr(AnswerLosses, "of", counted)
    ground = pool.ground(tmp_path, training=rows_of(LEARNED, ["french", "german", "past"]))
    first = cluster_experts(ground)
    assert cluster_experts(replace(ground, shared={})) == first
    assert len(measured) == 3
    cluster_experts(replace(ground, training=rows_of(LEARNED[:1], ["french", "german", "past"])))
    assert len(measured) == 6


def test_a_cluster_without_an_adapter_that_a_gate_can_weigh_has_no_expert(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", base)
    try:
        pool.hub.remove("rhyme")
        biased = tiny_adapter(tmp_path / "biased", base, lora_bias=True)
        pool.hub.register(biased, base_model=base, name="rhyme", samples=["Oak rhymes with"])
        assert sorted(cluster_experts(pool.ground(tmp_path))) == ["grammar", "sentiment", "translation"]
        few = pool.ground(tmp_path, training=rows_of(LEARNED, ["rhyme", "french"]))
        with pytest.raises(ConfigurationError, match="1 of the domains sound, translation have an own adapter"):
            short("smear").prepare(few)
    finally:
        pool.hub.close()


@pytest.mark.parametrize("name", GATED)
def test_a_gate_is_learned_once_kept_and_put_to_use(pool: Pool, ground: Ground, name: str) -> None:
    chosen, strategy = short(name), name.removesuffix("-ood")
    chosen.prepare(ground)
    file = ground.folder / f"{strategy}.safetensors"
    gate = (Ramole if strategy == "ramole" else ExpertGate).load(file)
    written = file.stat().st_mtime_ns
    pool.hub.use_gate(None, base_model=pool.base)
    short(name).prepare(replace(ground, shared={}))
    assert file.stat().st_mtime_ns == written
    assert pool.hub.gates[gate.base_model][strategy].digest == gate.digest
    assert not file.with_name(file.name + ".part").exists()
    if isinstance(gate, ExpertGate):
        experts = pool.folders if name == "arrow" else cluster_experts(ground).values()
        assert sorted(gate.experts) == sorted(experts)
    else:
        assert sorted(gate.trained) == sorted(pool.folders)


def test_all_gated_systems_answer_side_by_side(pool: Pool, ground: Ground) -> None:
    asked: list[tuple[str, Routing]] = []
    for name in GATED:
        chosen = short(name)
        chosen.prepare(ground)
        found = chosen.routings(ground, pool.questions.rows)
        asked += [(row.inputs, one) for row, one in zip(pool.questions.rows, found, strict=True) if one]
    assert len(asked) == len(GATED) * len(pool.questions)
    answers = pool.hub.generate(
        [text for text, _ in asked], base_model=pool.base, routing=[one for _, one in asked], sampling=Sampling(2)
    )
    for (_, routing), answer in zip(asked, answers, strict=True):
        route = answer.trace.route
        assert route.averaged == ("prompt" if routing.strategy == "smear" else "tokens")
        assert len(route.members) == {"ramole": 3, "arrow": 6}.get(routing.strategy, 4)
        assert not {member.adapter.name for member in route.members} & {*routing.exclude}
    masked = short("ramole-ood").routings(ground, pool.questions.of(["past"]).rows)
    assert {one.exclude for one in masked if one} == {("past",)}
