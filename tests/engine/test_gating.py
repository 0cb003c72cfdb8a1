"""Weights from a gate, in both forms, equal the plain reference with every output in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_hub_sdk.composition.reference import ramole_einsum, stack_padded
from lora_hub_sdk.engine import batch_lora
from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
from lora_hub_sdk.engine.forms import choose_form
from lora_hub_sdk.engine.linear import linear_products
from lora_hub_sdk.engine.lora_layers import LoraLayers
from lora_hub_sdk.types import Member, Route
from tests.engine.loras import ADAPTERS, CPU, SHAPES, expected_delta, placed, pool_of, routes
from tests.engine.test_lora_layers import inputs_of
from tests.support import bare_adapter, relative_error


@dataclass(frozen=True)
class Gate:
    """A random router; it has nothing for the module "k", so every member has the score 0 there."""

    digest: str
    width: int
    seed: int
    strategy: str = "ramole"

    def module(self, path: str) -> tuple[Tensor, Tensor] | None:
        if path == "k":
            return None
        draw = torch.Generator().manual_seed(self.seed + len(path) + ord(path[0]))
        d_out, d_in = SHAPES[path]
        return torch.randn(self.width, d_in, generator=draw), torch.randn(d_out, self.width, generator=draw)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / self.width**0.5, -1).nan_to_num(0.0)


FIRST, SECOND = Gate("first", 3, 1), Gate("second", 5, 2)


def gated_routes() -> st.SearchStrategy[Route]:
    members = st.lists(st.integers(0, len(ADAPTERS) - 1), min_size=1, max_size=4, unique=True)
    return members.map(
        lambda places: Route("ramole", "tokens", tuple(Member(bare_adapter(f"lora{one}"), 1.0) for one in places))
    )


def reference(path: str, x: Tensor, route: Route, gate: Gate) -> Tensor:
    """(l, d_out) of one row; an adapter without the module takes part with an output of zero."""
    places = [int(member.adapter.name.removeprefix("lora")) for member in route.members]
    present = [ADAPTERS[place].modules[path] for place in places if path in ADAPTERS[place].modules]
    if not present:
        return torch.zeros(len(x), SHAPES[path][0])
    a, b = stack_padded(present)
    missing = len(places) - len(present)
    a = torch.cat([a, torch.zeros(missing, *a.shape[1:])])
    b = torch.cat([b, torch.zeros(missing, *b.shape[1:])])
    own = gate.module(path) or (torch.zeros(gate.width, x.shape[1]), torch.zeros(b.shape[1], gate.width))
    return ramole_einsum(x[None], a, b, torch.ones(1, len(places), dtype=torch.bool), *own)[0]


class Layers:
    """The modules of ``SHAPES`` with a pool that keeps keys for both gates."""

    def __init__(self, *, late: bool = False) -> None:
        torch.manual_seed(0)
        self.modules: dict[str, Any] = {
            path: torch.nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
            for path, (d_out, d_in) in SHAPES.items()
        }
        self.pool = pool_of()
        if late:  # adapters are there before the gates
            for adapter in ADAPTERS:
                self.pool.pin(adapter)
        self.pool.use_gates([FIRST])
        self.pool.use_gates([SECOND])
        self.pool.add_gate(FIRST)
        self.lora = LoraLayers(self.modules, linear_products(self.modules), self.pool)

    def check(self, asked: Sequence[tuple[Route, Gate | None]], tokens: int) -> None:
        inputs = inputs_of(len(asked), tokens)
        rows = []
        for route, gate in asked:
            row = placed(route, self.pool)
            rows.append(row if gate is None else RowLora(row.terms, row.ranks, gate.digest))
        batch = BatchLora(rows, device=CPU, dtype=torch.float32, gates=self.pool.gates)
        with torch.inference_mode(), self.lora.apply(batch, tokens):
            found = {path: module(inputs[SHAPES[path][1]]) for path, module in self.modules.items()}
        for path, module in self.modules.items():
            x = inputs[SHAPES[path][1]]
            for place, (route, gate) in enumerate(asked):
                delta = (
                    expected_delta(path, x[place], route) if gate is None else reference(path, x[place], route, gate)
                )
                assert relative_error(found[path][place], module(x[place]) + delta) < 5e-5, (path, place)


@pytest.mark.parametrize("form", ["lookup", "gather", "dense"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_gated_rows_beside_static_ones_equal_the_reference(form: str, data: st.DataObject) -> None:
    gates = st.sampled_from([FIRST, SECOND])
    some = st.one_of(st.tuples(gated_routes(), gates), st.tuples(routes(), st.none()))
    asked = data.draw(st.lists(some, min_size=1, max_size=6))
    tokens = 1 if form == "lookup" else data.draw(st.integers(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_lora, "choose_form", lambda **at: form if at["gated"] or tokens == 1 else "gather")
        Layers().check(asked, tokens)


@settings(deadline=None, max_examples=30)
@given(st.lists(gated_routes(), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
def test_the_chosen_form_and_a_gate_that_comes_after_the_adapters(asked: list[Route], tokens: int, late: bool) -> None:
    Layers(late=late).check([(route, FIRST) for route in asked], tokens)


@pytest.mark.parametrize(
    ("on_cpu", "tokens", "looked_up", "different", "form"),
    [
        (True, 1, 18, 12, "lookup"),
        (True, 1, 96, 12, "dense"),
        (True, 2, 18, 12, "gather"),
        (True, 2, 18, 6, "dense"),
        (False, 1, 18, 12, "gather"),
        (False, 1, 18, 6, "dense"),
    ],
)
def test_ranks_that_many_gated_rows_have_are_multiplied_once(
    on_cpu: bool, tokens: int, looked_up: int, different: int, form: str
) -> None:
    found = choose_form(
        on_cpu=on_cpu,
        half=False,
        tokens=tokens,
        gated=True,
        routes=1,
        looked_up=looked_up,
        different=different,
        widest=6,
    )
    assert found == form


def test_keys_follow_their_rows_through_growth_eviction_and_compaction() -> None:
    layers = Layers()
    pool = layers.pool
    for adapter in ADAPTERS:
        pool.pin(adapter)
        pool.unpin(adapter.digest)
    pool.discard(ADAPTERS[0].digest)
    pool.compact()
    assert list(pool.gates) == [SECOND.digest]  # nothing runs, so only what is in use is kept
    route = Route("ramole", "tokens", tuple(Member(bare_adapter(f"lora{one}"), 1.0) for one in (0, 3, 5)))
    layers.check([(route, SECOND)], 1)
    layers.check([(route, SECOND)], 3)
