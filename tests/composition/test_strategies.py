from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.composition import STRATEGIES, get_strategy, route_from_hits
from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.composition.weighting import similarity, uniform
from lora_hub_sdk.errors import ConfigurationError, UnknownStrategyError
from lora_hub_sdk.types import Hit, Routing
from tests.support import bare_adapter

HITS = [Hit(bare_adapter(name), score) for name, score in (("a", 0.9), ("b", 0.6), ("c", 0.1))]


def test_selection_takes_the_first_hit_alone() -> None:
    (member,) = route_from_hits(get_strategy("selection"), HITS).members
    assert (member.adapter.name, member.weight, member.score) == ("a", 1.0, 0.9)


@pytest.mark.parametrize(("name", "averaged"), [("mixture", "outputs"), ("fusion", "parameters")])
def test_mixture_and_fusion_share_weights_and_differ_in_where_they_average(name: str, averaged: str) -> None:
    route = route_from_hits(get_strategy(name), HITS)
    assert route.averaged == averaged
    assert [member.weight for member in route.members] == pytest.approx([1 / 3] * 3)


def test_base_routes_to_no_adapter() -> None:
    assert route_from_hits(get_strategy("base"), HITS).members == ()


def test_no_hits_leave_the_base_model() -> None:
    assert route_from_hits(get_strategy("mixture"), []).as_dict()["adapters"] == []


def test_similarity_weights_are_a_softmax_at_temperature_a_fifth() -> None:
    first, second = similarity([0.5, 0.3])
    assert first / second == pytest.approx(2.718281828, rel=1e-6)


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=8))
def test_weights_are_a_distribution_in_the_order_of_scores(scores: list[float]) -> None:
    for weights in (uniform(scores), similarity(scores)):
        assert sum(weights) == pytest.approx(1.0)
        assert all(weight > 0 for weight in weights)
    ranked = similarity(sorted(scores, reverse=True))
    assert ranked == sorted(ranked, reverse=True)


def test_an_adapter_without_weight_is_left_out_of_its_route() -> None:
    members = route_from_hits(get_strategy("mixture"), HITS, [0.7, 0.0, 0.3]).members
    assert [(member.adapter.name, member.weight) for member in members] == [("a", 0.7), ("c", 0.3)]


def test_an_unknown_strategy_is_named_with_those_that_exist() -> None:
    with pytest.raises(UnknownStrategyError, match="selection") as caught:
        get_strategy("soup")
    assert caught.value.known == tuple(STRATEGIES)
    with pytest.raises(UnknownStrategyError):
        get_strategy(["unhashable"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "routing",
    [
        Routing(k=0),
        Routing(k=-1),
        Routing(k=True),
        Routing(k=2.5),  # type: ignore[arg-type]
        Routing(weights="heavy"),
        Routing(adapters=()),
        Routing(strategy="selection", adapters=("a", "b")),
        Routing(adapter_weights=(1.0,)),
        Routing(adapters=("a", "b"), adapter_weights=(1.0,)),
        Routing(adapters=("a", "b"), adapter_weights=(1.0, float("nan"))),
        Routing(adapters=("a", "b"), adapter_weights=(1.0, True)),
        Routing(adapters=("a", "b"), adapter_weights=(0.0, 0)),
        Routing(adapters=("a",), adapter_weights=0.5),  # type: ignore[arg-type]
    ],
)
def test_options_that_make_no_sense_are_refused(routing: Routing) -> None:
    with pytest.raises(ConfigurationError):
        check_routing(routing)
