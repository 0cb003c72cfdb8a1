"""A gate over experts by itself: its rules, its file, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate, GateRule, expert_weights
from lora_hub_sdk.composition.gate_file import load_gate
from lora_hub_sdk.composition.ramole import Ramole, RouterLora
from lora_hub_sdk.composition.strategies import STRATEGIES
from lora_hub_sdk.composition.tensor_file import tensor_bytes
from lora_hub_sdk.errors import ConfigurationError

EXPERTS = {"second": "b" * 64, "first": "a" * 64, "third": "c" * 64}
NONE = float("-inf")


def gate_of(strategy: str = "arrow", rows: int = 3) -> ExpertGate:
    draw = torch.Generator().manual_seed(0)
    directions = {
        "layers.0.q": torch.randn(rows, 4, generator=draw),
        "layers.1.q": torch.randn(rows, 6, generator=draw),
    }
    return ExpertGate(strategy, "user/base", EXPERTS, directions, {"steps": 3})


def test_every_strategy_over_fixed_experts_has_a_rule_and_is_averaged_as_that_says() -> None:
    fixed = {name: strategy.averaged for name, strategy in STRATEGIES.items() if strategy.fixed}
    assert fixed == {name: "prompt" if rule.per == "prompt" else "tokens" for name, rule in RULES.items()}


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (GateRule(), [1, -3, 2, 0]),
        (GateRule(top_k=1), [NONE, NONE, 2, NONE]),
        (GateRule(top_k=2, absolute=True), [NONE, 3, 2, NONE]),
        (GateRule(top_k=9, absolute=True, temperature=2.0), [0.5, 1.5, 1, 0]),
    ],
)
def test_a_rule_is_a_softmax_over_those_that_it_keeps(rule: GateRule, want: list[float]) -> None:
    found = expert_weights(torch.tensor([1.0, -3.0, 2.0, 0.0]), rule)
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float32).softmax(-1))


def test_places_without_an_expert_have_no_weight_whatever_the_rule_keeps() -> None:
    scores = torch.tensor([[NONE, -1.0, NONE], [NONE, NONE, NONE], [0.5, 0.1, NONE]])
    for rule in (GateRule(), GateRule(top_k=2, absolute=True), GateRule(top_k=1)):
        found = expert_weights(scores, rule)
        assert found[0].tolist() == [0, 1, 0]
        assert found[1].tolist() == [0, 0, 0]
        assert found[2, 2] == 0
        torch.testing.assert_close(found[2].sum(), torch.tensor(1.0))


def test_a_file_brings_all_of_it_back_with_the_experts_in_their_order(tmp_path: Path) -> None:
    gate = gate_of("smear")
    gate.save(tmp_path / "gate")
    back = load_gate(tmp_path / "gate")
    assert isinstance(back, ExpertGate)
    assert (back.strategy, back.base_model, list(back.experts.items())) == ("smear", "user/base", [*EXPERTS.items()])
    assert back.training == {"steps": 3}
    assert back.digest == gate.digest != gate_of("arrow").digest
    assert back.directions.keys() == gate.directions.keys()
    assert all(torch.equal(back.directions[path], one) for path, one in gate.directions.items())


def test_a_file_of_the_other_kind_comes_back_as_that(tmp_path: Path) -> None:
    other = Ramole("user/base", {"layers.0.q": RouterLora(torch.ones(2, 4), torch.ones(3, 2))})
    other.save(tmp_path / "gate")
    back = load_gate(tmp_path / "gate")
    assert isinstance(back, Ramole)
    assert back.digest == other.digest
    with pytest.raises(ConfigurationError, match=r"is no gate over experts; hub\.train_experts"):
        ExpertGate.load(tmp_path / "gate")


def test_what_is_no_gate_is_refused_and_so_is_a_damaged_one(tmp_path: Path) -> None:
    gate_of().save(tmp_path / "gate")
    content = (tmp_path / "gate").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-8])
    (tmp_path / "later").write_bytes(content.replace(b'\\"version\\": \\"1\\"', b'\\"version\\": \\"2\\"'))
    (tmp_path / "weights").write_bytes(tensor_bytes({"w": torch.ones(2)}, {}))
    for name, told in (
        ("nothing", "cannot be read"),
        ("cut", "no gate"),
        ("later", "version '2'"),
        ("weights", "no gate"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            load_gate(tmp_path / name)


def test_directions_that_do_not_go_with_experts_or_base_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="found \\[2\\] directions for 3 experts"):
        gate_of(rows=2)
    with pytest.raises(ConfigurationError, match="has no fixed experts"):
        gate_of("mixture")
    gate_of().check_fits({"layers.0.q": (9, 4), "layers.1.q": (9, 6), "layers.1.k": (9, 6)})
    with pytest.raises(ConfigurationError, match="reads 6 inputs, this base model lacks it"):
        gate_of().check_fits({"layers.0.q": (9, 4)})
    with pytest.raises(ConfigurationError, match=r"reads 4 inputs, this base model has \(9, 5\)"):
        gate_of().check_fits({"layers.0.q": (9, 5), "layers.1.q": (9, 6)})
