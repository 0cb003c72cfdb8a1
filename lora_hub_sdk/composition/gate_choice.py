"""Which of the gates in use, one for each strategy, weighs a route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate
from lora_hub_sdk.composition.gates import Gate
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import GATED, Route

_G = TypeVar("_G", bound=Gate)


def changed_gates(gates: Mapping[str, _G], gate: _G | None, strategy: str | None) -> dict[str, _G]:
    """The gates by strategy, and this one among them; None takes that of ``strategy`` away, or those of all.

    Raises:
        ConfigurationError: a gate for another strategy than ``strategy``.
    """
    if gate is None:
        return {name: one for name, one in gates.items() if strategy is not None and name != strategy}
    if strategy is not None and strategy != gate.strategy:
        raise ConfigurationError(f"strategy={strategy!r} was asked for, and this gate is for {gate.strategy!r}")
    return {**gates, gate.strategy: gate}


def gate_for(route: Route, gates: Mapping[str, _G], base_model: str) -> _G | None:
    """The gate that weighs a route, of those by strategy; None for a route that brings its weights.

    Raises:
        ConfigurationError: none is in use for its strategy, or that one does not weigh such a route.
    """
    if route.averaged not in GATED or not route.members:
        return None
    gate = gates.get(route.strategy)
    if gate is None:
        raise missing_gate(route.strategy, base_model)
    averaged = "tokens"
    if isinstance(gate, ExpertGate):
        averaged = "prompt" if gate.rule.per == "prompt" else "tokens"
        own = set(gate.experts.values())
        for member in route.members:
            if member.adapter.digest not in own:
                raise unknown_expert(member.adapter.name, gate)
    if route.averaged != averaged:
        raise ConfigurationError(
            f"a route of strategy {route.strategy!r} is averaged by {averaged!r}, found {route.averaged!r}; route with "
            "hub.route"
        )
    return gate


def missing_gate(strategy: str, base_model: str) -> ConfigurationError:
    """What is told where a strategy's gate is not there."""
    train = "hub.train_experts" if strategy in RULES else "hub.train_gate"
    return ConfigurationError(
        f"strategy {strategy!r} needs a gate for base model {base_model!r}, and none is in use; train one with "
        f"{train}, or give one to hub.use_gate"
    )


def unknown_expert(name: str, gate: ExpertGate) -> ConfigurationError:
    """What is told of an adapter that a gate knows nothing of, or knows with other content."""
    return ConfigurationError(
        f"adapter {name!r} is no expert of the gate in use for strategy {gate.strategy!r}, or has other content than "
        "the one that it was made for; make another gate with hub.train_experts, or leave the adapter out"
    )
