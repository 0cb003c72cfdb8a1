"""The packed products against torch's own, and the weights left as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hub_sdk.engine.linear import linear_products, padded_rows
from tests.support import relative_error


@settings(deadline=None, max_examples=60)
@given(
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    packed=st.booleans(),
)
def test_a_product_equals_torchs_own(d_in: int, d_out: int, rows: int, tokens: int, bias: bool, packed: bool) -> None:
    torch.manual_seed(d_in * d_out)
    module = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    product = linear_products({"m": module}, packed_bytes=(1 << 20) if packed else 0)["m"]
    x = torch.randn(rows, tokens, d_in)
    with torch.inference_mode():
        found = product(x)
    want = module(x)
    assert found.shape == want.shape
    assert float((found - want).abs().max()) < 1e-5 * max(1.0, float(want.abs().max()))
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


def test_there_are_few_different_numbers_of_rows_and_little_is_added() -> None:
    found = [padded_rows(rows) for rows in range(1, 4097)]
    assert found[:16] == list(range(1, 17)), "a step of a few rows is not slowed down"
    assert len(set(found)) < 64
    for rows, padded in enumerate(found, start=1):
        assert rows <= padded <= max(rows + 7, 1.5 * rows)
        assert padded_rows(padded) == padded


@pytest.mark.parametrize("packed_bytes", [0, 1 << 20])
def test_an_input_that_is_a_slice_or_a_matrix_is_taken_as_it_is(packed_bytes: int) -> None:
    module = nn.Linear(16, 8).requires_grad_(False)
    product = linear_products({"m": module}, packed_bytes=packed_bytes)["m"]
    x = torch.randn(3, 5, 32)
    with torch.inference_mode():
        assert relative_error(product(x[:, -1:, ::2]), module(x[:, -1:, ::2])) < 1e-5
        assert relative_error(product(x[0, :, :16]), module(x[0, :, :16])) < 1e-5


@pytest.mark.parametrize("packed_bytes", [0, 1 << 20])
def test_bfloat16_stays_within_its_own_precision(packed_bytes: int) -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 48).requires_grad_(False)
    x = torch.randn(4, 3, 64).bfloat16()
    want = nn.functional.linear(x.float(), module.weight.bfloat16().float(), module.bias.bfloat16().float())
    product = linear_products({"m": module.bfloat16()}, packed_bytes=packed_bytes)["m"]
    with torch.inference_mode():
        assert relative_error(product(x).float(), want) < 2**-7


def test_anything_but_a_plain_linear_keeps_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    modules: dict[str, nn.Module] = {
        "other": Conv1D(6, 4),  # type: ignore[no-untyped-call]
        "double": Doubled(4, 6),
        "wide": nn.Linear(4, 6, dtype=torch.float64),
    }
    products = linear_products(modules)
    with torch.inference_mode():
        for path, module in modules.items():
            x = torch.randn(2, 3, 4, dtype=torch.float64 if path == "wide" else torch.float32)
            assert products[path](x).equal(module(x))
