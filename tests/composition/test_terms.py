"""A route as stacked ranks and a mixing of their activations: against the paper's einsum and the definitions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_hub_sdk.composition.factors import LoraFactors
from lora_hub_sdk.composition.reference import fusion_einsum, mixture_einsum, stack_padded
from lora_hub_sdk.composition.terms import RouteTerms, terms_of
from lora_hub_sdk.types import Member, Route
from tests.support import bare_adapter, route_of

D_IN, D_OUT = 12, 7
A, B, C = (bare_adapter(name) for name in "abc")


def pool(ranks: list[int], seed: int = 0) -> list[LoraFactors]:
    draw = torch.Generator().manual_seed(seed)
    return [
        LoraFactors(
            torch.randn(rank, D_IN, generator=draw), torch.randn(D_OUT, rank, generator=draw), scale=0.5 + place
        )
        for place, rank in enumerate(ranks)
    ]


def terms(strategy: str, weights: list[float], factors: list[LoraFactors]) -> RouteTerms:
    adapters = [bare_adapter(f"lora {place}.") for place in range(len(factors))]
    ranks = {adapter.digest: one.rank for adapter, one in zip(adapters, factors, strict=True)}
    return terms_of(route_of(strategy, *zip(adapters, weights, strict=True)), ranks)


def delta(found: RouteTerms, x: Tensor, factors: list[LoraFactors]) -> Tensor:
    """What the terms say, word by word: h = A x of all members, mixed, then all their s B."""
    if not found.digests:
        return torch.zeros(*x.shape[:-1], D_OUT)
    by_digest = {bare_adapter(f"lora {place}.").digest: one for place, one in enumerate(factors)}
    members = [by_digest[digest] for digest in found.digests]
    hidden = torch.cat([x @ one.a.T for one in members], -1)
    mixed = [
        sum((weight * hidden[..., at] for at, weight in zip(partners, weights, strict=True)), torch.zeros(()))
        for partners, weights in zip(found.partners, found.weights, strict=True)
    ]
    return torch.stack(mixed, -1) @ torch.cat([one.scale * one.b.T for one in members])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[float], int]:
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    weight = st.one_of(st.just(0.0), st.floats(-1.0, 1.0, width=16))
    return ranks, draw(st.lists(weight, min_size=len(ranks), max_size=len(ranks))), draw(st.integers(0, 99))


@settings(deadline=None)
@given(cases(), st.sampled_from(["mixture", "fusion"]))
def test_the_terms_of_a_route_equal_the_papers_einsum(case: Any, strategy: str) -> None:
    ranks, weights, seed = case
    factors = pool(ranks, seed)
    x = torch.randn(1, 3, D_IN, generator=torch.Generator().manual_seed(seed))
    oracle = mixture_einsum if strategy == "mixture" else fusion_einsum
    expected = oracle(x, *stack_padded(factors), torch.tensor([weights]))
    found = terms(strategy, weights, factors)
    torch.testing.assert_close(delta(found, x, factors), expected, rtol=1e-4, atol=1e-4)
    assert found.size == sum(rank for rank, weight in zip(ranks, weights, strict=True) if weight)


def test_mixture_is_the_mean_of_the_outputs() -> None:
    factors = pool([2, 5, 3])
    x = torch.randn(1, 4, D_IN)
    outputs = [each.scale * (x @ each.a.T @ each.b.T) for each in factors]
    found = delta(terms("mixture", [1 / 3] * 3, factors), x, factors)
    torch.testing.assert_close(found, torch.stack(outputs).mean(0), rtol=1e-4, atol=1e-4)


def test_fusion_keeps_the_cross_terms() -> None:
    first, second = pool([3, 3])
    x = torch.randn(1, 2, D_IN)
    found = delta(terms("fusion", [0.5, 0.5], [first, second]), x, [first, second])
    straight = 0.25 * (first.scale * (x @ first.a.T @ first.b.T) + second.scale * (x @ second.a.T @ second.b.T))
    crossed = 0.25 * (second.scale * (x @ first.a.T @ second.b.T) + first.scale * (x @ second.a.T @ first.b.T))
    torch.testing.assert_close(found, straight + crossed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, straight, rtol=1e-2)


def test_a_rank_mixes_with_itself_in_a_mixture_and_with_all_of_its_depth_in_a_fusion() -> None:
    ranks = {A.digest: 1, B.digest: 2}
    members = (A.digest, B.digest), (0.25, 0.5), (0, 1, 1), (0, 0, 1)
    assert terms_of(route_of("mixture", (A, 0.25), (B, 0.5)), ranks) == RouteTerms(
        *members, ((0,), (1,), (2,)), ((0.25,), (0.5,), (0.5,))
    )
    assert terms_of(route_of("fusion", (A, 0.25), (B, 0.5)), ranks) == RouteTerms(
        *members, ((0, 1), (0, 1), (2,)), ((0.0625, 0.125), (0.125, 0.25), (0.25,)), fused=True
    )


def test_a_route_averaged_by_tokens_keeps_its_ranks_apart_and_says_so() -> None:
    route = Route("ramole", "tokens", (Member(A, 0.5), Member(B, 0.5)))
    terms = terms_of(route, {A.digest: 1, B.digest: 2})
    assert terms.gated
    assert not terms.fused
    assert terms.owners == (0, 1, 1)
    assert terms.partners == ((0,), (1,), (2,))


def test_equal_content_under_two_names_is_one_member_with_added_weights() -> None:
    twin = bare_adapter("twin", digest=A.digest)
    ranks = {A.digest: 2, B.digest: 3}
    for strategy in ("mixture", "fusion"):
        assert terms_of(route_of(strategy, (A, 0.25), (B, 0.5), (twin, 0.25)), ranks) == terms_of(
            route_of(strategy, (A, 0.5), (B, 0.5)), ranks
        )


def test_a_member_without_weight_is_left_out() -> None:
    ranks = {A.digest: 2, B.digest: 3, C.digest: 4}
    twin = bare_adapter("twin", digest=C.digest)
    for strategy in ("mixture", "fusion"):
        route = route_of(strategy, (A, 0.0), (B, 0.5), (C, 0.5), (twin, -0.5))
        assert terms_of(route, ranks) == terms_of(route_of(strategy, (B, 0.5)), ranks)
        assert terms_of(route_of(strategy, (A, 0.0)), ranks).size == 0
    assert terms_of(Route("base", "outputs", ()), {}).digests == ()


def test_equal_routes_have_the_same_terms_object() -> None:
    ranks = {A.digest: 2, B.digest: 3}
    first = terms_of(route_of("mixture", (A, 0.5), (B, 0.5)), ranks)
    assert terms_of(route_of("selection", (A, 0.5), (B, 0.5)), ranks) is first  # by what they do, not by their names
    assert terms_of(route_of("fusion", (A, 0.5), (B, 0.5)), ranks) is not first
