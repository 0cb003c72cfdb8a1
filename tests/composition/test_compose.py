"""One LoRA per row against the paper's einsum forms and against the definitions, on one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub_sdk.composition.compose import ComposedBatch, compose
from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.composition.mapping import build_plan
from lora_hub_sdk.composition.reference import fusion_einsum, mixture_einsum, stack_padded
from lora_hub_sdk.engine.lora_layers import add_delta_
from lora_hub_sdk.types import Plan
from tests.support import bare_adapter, route_of

D_IN, D_OUT = 12, 7


def pool(ranks: list[int], seed: int = 0) -> list[LoraFactors]:
    draw = torch.Generator().manual_seed(seed)
    return [
        LoraFactors(
            torch.randn(rank, D_IN, generator=draw), torch.randn(D_OUT, rank, generator=draw), scale=0.5 + place
        )
        for place, rank in enumerate(ranks)
    ]


def composed(matrix: list[list[float]], averaged: list[Any], factors: list[LoraFactors]) -> ComposedBatch:
    adapters = tuple(bare_adapter(f"lora{place}") for place in range(len(factors)))
    plan = Plan(adapters, tuple(map(tuple, matrix)), tuple(averaged))
    held = [AdapterFactors(adapter.digest, {"m": each}) for adapter, each in zip(adapters, factors, strict=True)]
    return compose(plan, held, dtype=torch.float32, device="cpu")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[list[float]], int, int]:
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    weight = st.one_of(st.just(0.0), st.floats(-1.0, 1.0, width=16))
    row = st.lists(weight, min_size=len(ranks), max_size=len(ranks))
    return ranks, draw(st.lists(row, min_size=1, max_size=5)), draw(st.integers(1, 4)), draw(st.integers(0, 99))


@settings(deadline=None)
@given(cases(), st.sampled_from(["outputs", "parameters"]))
def test_one_lora_per_row_equals_the_papers_einsum(case: Any, averaged: str) -> None:
    ranks, matrix, length, seed = case
    factors = pool(ranks, seed)
    x = torch.randn(len(matrix), length, D_IN, generator=torch.Generator().manual_seed(seed))
    oracle = mixture_einsum if averaged == "outputs" else fusion_einsum
    expected = oracle(x, *stack_padded(factors), torch.tensor(matrix))
    batch = composed(matrix, [averaged] * len(matrix), factors)
    found = torch.zeros(len(matrix), length, D_OUT)
    if "m" in batch.modules:  # not there where all weights are zero
        add_delta_(found, x, batch.modules["m"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mixture_is_the_mean_of_the_outputs() -> None:
    factors = pool([2, 5, 3])
    x = torch.randn(1, 4, D_IN)
    batch = composed([[1 / 3] * 3], ["outputs"], factors)
    outputs = [each.scale * (x @ each.a.T @ each.b.T) for each in factors]
    torch.testing.assert_close(
        add_delta_(torch.zeros(1, 4, D_OUT), x, batch.modules["m"]), torch.stack(outputs).mean(0), rtol=1e-4, atol=1e-4
    )


def test_fusion_keeps_the_cross_terms() -> None:
    first, second = pool([3, 3])
    x = torch.randn(1, 2, D_IN)
    batch = composed([[0.5, 0.5]], ["parameters"], [first, second])
    found = add_delta_(torch.zeros(1, 2, D_OUT), x, batch.modules["m"])
    straight = 0.25 * (first.scale * (x @ first.a.T @ first.b.T) + second.scale * (x @ second.a.T @ second.b.T))
    crossed = 0.25 * (second.scale * (x @ first.a.T @ second.b.T) + first.scale * (x @ second.a.T @ first.b.T))
    torch.testing.assert_close(found, straight + crossed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, straight, rtol=1e-2)


def test_rows_of_one_route_share_one_composition() -> None:
    batch = composed([[0.5, 0.5]] * 8, ["outputs"] * 8, pool([2, 2]))
    assert batch.modules["m"].a.shape == (1, 4, D_IN)


def test_a_batch_of_base_rows_touches_no_module() -> None:
    plan = build_plan([route_of("base"), route_of("base")])
    assert compose(plan, [], dtype=torch.float32, device="cpu").modules == {}


def test_a_module_that_an_adapter_lacks_gets_nothing_from_it() -> None:
    first, second = pool([2, 3])
    adapters = (bare_adapter("first"), bare_adapter("second"))
    plan = Plan(adapters, ((0.5, 0.5), (0.0, 1.0)), ("outputs", "outputs"))
    held = [AdapterFactors("1", {"m": first, "n": first}), AdapterFactors("2", {"m": second})]
    lora = compose(plan, held, dtype=torch.float32, device="cpu").modules["n"]
    x = torch.randn(2, 1, D_IN)
    found = add_delta_(torch.zeros(2, 1, D_OUT), x, lora)
    torch.testing.assert_close(found[0], 0.5 * first.scale * (x[0] @ first.a.T @ first.b.T), rtol=1e-4, atol=1e-5)
    assert found[1].abs().max() == 0


def test_select_keeps_the_rows_asked_for() -> None:
    batch = composed([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], ["outputs"] * 3, pool([2, 4]))
    kept = batch.select(torch.tensor([2, 0]))
    assert torch.equal(kept.modules["m"].b, batch.modules["m"].b[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_and_cast_once(dtype: torch.dtype) -> None:
    factors = pool([2, 2])
    exact = composed([[0.3, 0.7]], ["parameters"], factors).modules["m"]
    adapters = tuple(bare_adapter(f"lora{place}") for place in range(2))
    plan = Plan(adapters, ((0.3, 0.7),), ("parameters",))
    held = [AdapterFactors(adapter.digest, {"m": each}) for adapter, each in zip(adapters, factors, strict=True)]
    cast = compose(plan, held, dtype=dtype, device="cpu")
    assert torch.equal(cast.modules["m"].a, exact.a.to(dtype))
    assert torch.equal(cast.modules["m"].b, exact.b.to(dtype))
    # Steps of one token keep the float32 factors on a CPU.
    assert torch.equal(cast.for_decoding().modules["m"].b, exact.b)
