"""Every form of the LoRA product against the paper's einsum, and the model untouched outside a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_hub_sdk.engine import batch_lora
from lora_hub_sdk.engine.forms import Form
from lora_hub_sdk.engine.linear import linear_products
from lora_hub_sdk.engine.lora_layers import LoraLayers
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Route
from tests.engine.loras import ADAPTERS, GROUPS, SHAPES, batch_of, expected_delta, pool_of, routes
from tests.support import bare_adapter, relative_error, route_of

LORA0, LORA3, LORA4 = (bare_adapter(f"lora{place}") for place in (0, 3, 4))


class Layers:
    """The modules of ``SHAPES`` as plain linears, with a pool beside them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules: dict[str, nn.Module] = {
            path: nn.Linear(d_in, d_out, bias=path == "q").requires_grad_(False)
            for path, (d_out, d_in) in SHAPES.items()
        }
        self.pool = pool_of()
        self.lora = LoraLayers(self.modules, linear_products(self.modules), self.pool)

    def run(self, asked: Sequence[Route], inputs: dict[int, Tensor], tokens: int) -> dict[str, Tensor]:
        """The output of each module; modules of one width of input get the same tensor, as q, k and v do."""
        with torch.inference_mode(), self.lora.apply(batch_of(asked, self.pool), tokens):
            return {path: module(inputs[SHAPES[path][1]]) for path, module in self.modules.items()}

    def expected(self, asked: Sequence[Route], inputs: dict[int, Tensor]) -> dict[str, Tensor]:
        found = {}
        for path, module in self.modules.items():
            x = inputs[SHAPES[path][1]]
            deltas = [expected_delta(path, rows, route) for rows, route in zip(x, asked, strict=True)]
            found[path] = module(x) + torch.stack(deltas)
        return found


def inputs_of(rows: int, tokens: int, seed: int = 0) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {d_in: torch.randn(rows, tokens, d_in, generator=draw) for d_in in (8, 12)}


def force(patch: pytest.MonkeyPatch, form: Form) -> None:
    patch.setattr(batch_lora, "choose_form", lambda **_: form)


@pytest.mark.parametrize("form", get_args(Form))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_form_equals_the_papers_einsum(form: Form, data: st.DataObject) -> None:
    tokens = 1 if form in ("lookup", "dense") else data.draw(st.integers(1, 4), "tokens")
    if form == "shared":
        asked = [data.draw(routes(), "route")] * data.draw(st.integers(1, 5), "rows")
    else:
        asked = data.draw(st.lists(routes(), min_size=1, max_size=6), "routes")
    layers, inputs = Layers(), inputs_of(len(asked), tokens)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, form)
        found = layers.run(asked, inputs, tokens)
    for path, want in layers.expected(asked, inputs).items():
        assert relative_error(found[path], want) < 1e-5, path


@settings(deadline=None, max_examples=60)
@given(st.lists(routes(), min_size=1, max_size=6), st.integers(1, 3))
def test_the_chosen_form_equals_it_too(asked: list[Route], tokens: int) -> None:
    layers, inputs = Layers(), inputs_of(len(asked), tokens)
    found = layers.run(asked, inputs, tokens)
    for path, want in layers.expected(asked, inputs).items():
        assert relative_error(found[path], want) < 1e-5, path


@pytest.mark.parametrize("form", ["lookup", "dense", "gather"])
def test_fusion_beside_mixture_beside_base_rows(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        route_of("fusion", (LORA0, 0.5), (LORA3, 0.3), (LORA4, 0.2)),
        route_of("base"),
        route_of("mixture", (LORA0, 0.5), (LORA3, 0.5)),
        route_of("mixture", (LORA4, 0.0)),
        route_of("fusion", (LORA3, 1.0)),
        route_of("base"),
    ]
    force(monkeypatch, form)
    layers, inputs = Layers(), inputs_of(len(asked), 1)
    found = layers.run(asked, inputs, 1)
    for path, want in layers.expected(asked, inputs).items():
        assert relative_error(found[path], want) < 1e-5, path
        plain = layers.modules[path](inputs[SHAPES[path][1]])
        for base_row in (1, 3, 5):
            assert relative_error(found[path][base_row], plain[base_row]) < 1e-6


@pytest.mark.parametrize("form", get_args(Form))
def test_rows_and_tokens_that_a_model_flattens_are_told_apart(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, form)
    tokens = 1 if form in ("lookup", "dense") else 3
    other = LORA0 if form == "shared" else LORA4
    asked = [route_of("mixture", (LORA0, 0.5)), route_of("mixture", (other, 0.5))]
    layers, inputs = Layers(), inputs_of(2, tokens)
    found = layers.run(asked, {width: x.flatten(0, 1) for width, x in inputs.items()}, tokens)
    for path, want in layers.expected(asked, inputs).items():
        assert relative_error(found[path], want.flatten(0, 1)) < 1e-5, path


def test_a_module_that_sees_only_some_tokens_is_refused() -> None:
    layers = Layers()
    asked = [route_of("mixture", (LORA0, 0.5)), route_of("mixture", (LORA4, 0.5))]
    with pytest.raises(ConfigurationError, match="'q' is given some tokens only"):
        layers.run(asked, {8: torch.randn(5, 8), 12: torch.randn(6, 12)}, 3)


@pytest.mark.parametrize("form", ["lookup", "gather"])
def test_numbers_that_are_none_stay_in_their_row(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, form)
    asked = [
        route_of("mixture", (LORA0, 0.5), (LORA3, 0.5)),
        route_of("base"),
        route_of("fusion", (LORA0, 0.5), (LORA4, 0.5)),
    ]
    layers, inputs = Layers(), inputs_of(3, 1)
    for x in inputs.values():
        x[0] = torch.nan
    found = layers.run(asked, inputs, 1)
    for path, want in layers.expected(asked, inputs).items():
        assert found[path][0].isnan().all()
        assert relative_error(found[path][1:], want[1:]) < 1e-5, path


def test_an_input_of_the_same_values_but_another_tensor_is_computed_anew() -> None:
    """q, k and v share what was computed for their input; a new input must not get the old one's."""
    layers = Layers()
    asked = [route_of("mixture", (LORA0, 1.0)), route_of("mixture", (LORA4, 1.0))]
    first, second = inputs_of(2, 1), inputs_of(2, 1, seed=1)
    with torch.inference_mode(), layers.lora.apply(batch_of(asked, layers.pool), 1):
        mixed = {"q": layers.modules["q"](first[8]), "k": layers.modules["k"](second[8])}
    assert relative_error(mixed["q"], layers.expected(asked, first)["q"]) < 1e-5
    assert relative_error(mixed["k"], layers.expected(asked, second)["k"]) < 1e-5


def test_one_batch_serves_passes_of_many_tokens_and_of_one() -> None:
    layers = Layers()
    asked = [route_of("fusion", (LORA0, 0.5), (LORA4, 0.5)), route_of("mixture", (LORA3, 1.0))]
    batch = batch_of(asked, layers.pool)
    for tokens in (3, 1, 1):
        inputs = inputs_of(2, tokens, seed=tokens)
        with torch.inference_mode(), layers.lora.apply(batch, tokens):
            found = {path: module(inputs[SHAPES[path][1]]) for path, module in layers.modules.items()}
        for path, want in layers.expected(asked, inputs).items():
            assert relative_error(found[path], want) < 1e-5, path


# -- the model itself --------------------------------------------------------------------------------------------------


def test_outside_a_pass_a_modules_forward_is_its_own() -> None:
    layers, inputs = Layers(), inputs_of(1, 2)
    before = {path: dict(module.__dict__) for path, module in layers.modules.items()}
    layers.run([route_of("mixture", (LORA0, 9.0))], inputs, 2)
    for path, module in layers.modules.items():
        assert module.__dict__ == before[path]
        assert "forward" not in module.__dict__


def test_outside_a_pass_that_failed_it_is_so_too() -> None:
    layers, inputs = Layers(), inputs_of(1, 2)
    plain = layers.modules["q"](inputs[8])
    batch = batch_of([route_of("mixture", (LORA0, 9.0))], layers.pool)
    with layers.lora.apply(batch, 2):
        assert not layers.modules["q"](inputs[8]).equal(plain)
    with pytest.raises(RuntimeError, match=r"inner product|shapes"), layers.lora.apply(batch, 2):
        layers.modules["q"](inputs[12])
    assert layers.modules["q"](inputs[8]).equal(plain)


def test_a_pass_without_adapters_gives_the_base_models_products() -> None:
    layers, inputs = Layers(), inputs_of(2, 3)
    batch_of([route_of("mixture", (LORA0, 9.0))], layers.pool)  # in the pool, for others
    found = layers.run([route_of("base"), route_of("base")], inputs, 3)
    for path, module in layers.modules.items():
        assert relative_error(found[path], module(inputs[SHAPES[path][1]])) < 1e-6


def test_the_pools_groups_are_those_of_the_shapes() -> None:
    assert {path for group in GROUPS for path in group} == SHAPES.keys()
    assert any(len(adapter.modules) < len(SHAPES) for adapter in ADAPTERS)


@pytest.mark.parametrize("form", ["lookup", "dense", "gather"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_stays_within_its_tolerance(
    form: Form, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight and eleven bits: 3 % and 0.4 % of the largest value of a row's output."""
    force(monkeypatch, form)
    layers, inputs = Layers(), inputs_of(2, 1)
    asked = [route_of("mixture", (LORA0, 0.5), (LORA4, 0.5)), route_of("fusion", (LORA3, 0.7), (LORA4, 0.3))]
    want = layers.expected(asked, inputs)
    halves: Any = {path: module.to(dtype) for path, module in layers.modules.items()}
    pool = pool_of(dtype)
    lora = LoraLayers(halves, linear_products(halves), pool)
    rows = batch_of(asked, pool).rows
    batch = batch_lora.BatchLora(rows, device=torch.device("cpu"), dtype=dtype)
    with torch.inference_mode(), lora.apply(batch, 1):
        for path, module in halves.items():
            assert relative_error(module(inputs[SHAPES[path][1]].to(dtype)).float(), want[path]) < tolerance, path
