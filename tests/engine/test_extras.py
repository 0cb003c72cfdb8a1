"""What adapters have beside factors: gains, shifts, embeddings and modules of their own, mixed row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine import batch_lora
from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
from lora_hub_sdk.engine.forms import Form
from lora_hub_sdk.engine.linear import linear_products
from lora_hub_sdk.engine.lora_layers import LoraLayers
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.types import Route
from tests.support import bare_adapter, relative_error, route_of

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 11, 8
#: Linear modules (d_out, d_in): q and k share an input, q has a bias.
LINEARS = {"q": (12, WIDTH), "k": (4, WIDTH), "head": (VOCABULARY, 12)}
SHAPES = LINEARS | {"embed": (WIDTH, VOCABULARY)}
GROUPS = [("q", "k"), ("head",), ("embed",)]


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def random_adapter(place: int) -> AdapterFactors:
    """Each adapter has another choice of what there is; the first has factors alone, the fourth none at all."""
    draw = torch.Generator().manual_seed(place)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    modules = {}
    for at, (path, (d_out, d_in)) in enumerate(SHAPES.items()):
        if place == 3 or (place + at) % 4 == 3:
            continue
        rank = 1 + (place + at) % 3
        gain = 1 + 0.3 * normal(d_out) if place in (1, 4) else None
        b = normal(d_out, rank)
        shift = normal(d_out) if place in (2, 4) and path != "embed" else None
        modules[path] = LoraFactors(normal(rank, d_in), b if gain is None else gain[:, None] * b, 0.5, gain, shift)
    saved: dict[str, dict[str, Tensor]] = {}
    if place in (3, 4):
        saved["norm"] = {"weight": normal(WIDTH)}
    if place == 3:
        saved["head"] = {"weight": normal(*LINEARS["head"])}
        saved["embed"] = {"weight": normal(VOCABULARY, WIDTH)}
        saved["q"] = {"weight": normal(*LINEARS["q"]), "bias": normal(12)}
    return AdapterFactors(bare_adapter(f"lora{place}").digest, modules, saved)


ADAPTERS = [random_adapter(place) for place in range(5)]
_BY_DIGEST = {adapter.digest: adapter for adapter in ADAPTERS}


class Layers:
    """An embedding, a norm, and linear modules, with a pool beside them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules: dict[str, nn.Module] = {
            "embed": ScaledEmbedding(),
            "norm": nn.LayerNorm(WIDTH),
            **{path: nn.Linear(d_in, d_out, bias=path == "q") for path, (d_out, d_in) in LINEARS.items()},
        }
        for module in self.modules.values():
            module.requires_grad_(False)
        self.pool = RankPool(
            GROUPS, SHAPES, dtype=torch.float32, device=CPU, budget_bytes=1 << 20, modules=self.modules
        )
        linears = {path: self.modules[path] for path in LINEARS}
        self.lora = LoraLayers(self.modules, linear_products(linears), self.pool, embedding="embed")

    def row(self, route: Route) -> RowLora:
        terms = terms_of(route, {digest: one.rank for digest, one in _BY_DIGEST.items()})
        return RowLora(terms, tuple(row for digest in terms.digests for row in self.pool.pin(_BY_DIGEST[digest])))

    def through(self, ids: Tensor) -> dict[str, Tensor]:
        """What each module gives; all inputs come from the embedding of ids (b, l)."""
        embedded = self.modules["embed"](ids)
        normed = self.modules["norm"](embedded)
        q = self.modules["q"](normed)
        return {
            "embed": embedded,
            "norm": normed,
            "q": q,
            "k": self.modules["k"](normed),
            "head": self.modules["head"](q),
        }

    def run(self, asked: Sequence[Route], ids: Tensor) -> dict[str, Tensor]:
        batch = BatchLora([self.row(route) for route in asked], device=CPU, dtype=torch.float32)
        with torch.inference_mode(), self.lora.apply(batch, ids.shape[1]):
            return self.through(ids)

    def expected(self, route: Route, ids: Tensor) -> dict[str, Tensor]:
        """One row (l,) by the definitions, module by module."""
        found = {"embed": self._expected("embed", nn.functional.one_hot(ids, VOCABULARY).float(), route)}
        found["norm"] = self._expected("norm", found["embed"], route)
        found["q"] = self._expected("q", found["norm"], route)
        return found | {
            "k": self._expected("k", found["norm"], route),
            "head": self._expected("head", found["q"], route),
        }

    def _expected(self, path: str, x: Tensor, route: Route) -> Tensor:
        module: Any = self.modules[path]
        scale = 3.0 if path == "embed" else 1.0
        weight = module.weight.T if path == "embed" else module.weight
        bias = getattr(module, "bias", None)

        def plain(own_weight: Tensor, own_bias: Tensor | None) -> Tensor:
            if path == "norm":
                return nn.functional.layer_norm(x, (WIDTH,), own_weight, own_bias)
            return nn.functional.linear(x, own_weight, own_bias) * scale

        members = [(member.weight, _BY_DIGEST[member.adapter.digest]) for member in route.members]
        total = plain(weight, bias)
        for share, adapter in members:
            own = adapter.modules.get(path)
            if own is not None and own.gain is not None:
                total = total + share * (own.gain - 1) * plain(weight, None)
            if own is not None and own.shift is not None:
                total = total + share * own.shift
            if path in adapter.saved:
                saved = adapter.saved[path]
                replaced = saved["weight"].T if path == "embed" else saved["weight"]
                total = total + share * (plain(replaced, saved.get("bias", bias)) - plain(weight, bias))
        present = [(share, one.modules[path]) for share, one in members if path in one.modules]
        if present and route.averaged == "outputs":
            total = total + scale * sum(share * one.scale * (x @ one.a.T @ one.b.T) for share, one in present)
        elif present:
            rank = max(one.rank for _, one in present)
            pad = nn.functional.pad
            mean_a = sum(share * pad(one.a, (0, 0, 0, rank - one.rank)) for share, one in present)
            mean_b = sum(share * one.scale * pad(one.b, (0, rank - one.rank)) for share, one in present)
            total = total + scale * (x @ torch.as_tensor(mean_a).T @ torch.as_tensor(mean_b).T)
        return total


def some_routes() -> st.SearchStrategy[Route]:
    member = st.tuples(
        st.sampled_from([bare_adapter(f"lora{place}") for place in range(5)]), st.floats(-1, 1, width=16)
    )
    return st.builds(
        lambda strategy, members: route_of(strategy, *members),
        st.sampled_from(["mixture", "fusion"]),
        st.lists(member, max_size=4, unique_by=lambda pair: pair[0].name),
    )


@pytest.mark.parametrize("form", get_args(Form))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_row_gets_what_its_adapters_have_beside_factors(form: Form, data: st.DataObject) -> None:
    tokens = 1 if form in ("lookup", "dense") else data.draw(st.integers(1, 3), "tokens")
    if form == "shared":
        asked = [data.draw(some_routes(), "route")] * data.draw(st.integers(1, 4), "rows")
    else:
        asked = data.draw(st.lists(some_routes(), min_size=1, max_size=5), "routes")
    ids = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 10), min_size=tokens, max_size=tokens), min_size=len(asked), max_size=len(asked)
            )
        )
    )
    layers = Layers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_lora, "choose_form", lambda **_: form)
        found = layers.run(asked, ids)
    for place, route in enumerate(asked):
        for path, want in layers.expected(route, ids[place]).items():
            assert relative_error(found[path][place], want) < 2e-5, (path, place)


def test_a_pass_leaves_nothing_behind_and_the_base_as_it_was() -> None:
    layers = Layers()
    ids = torch.tensor([[1, 2], [3, 4]])
    with torch.inference_mode():
        before = layers.through(ids)
    layers.run([route_of("mixture", (bare_adapter("lora3"), 1.0), (bare_adapter("lora4"), 0.5)), route_of("base")], ids)
    assert all("forward" not in module.__dict__ for module in layers.modules.values())
    with torch.inference_mode():
        assert all(torch.equal(one, before[path]) for path, one in layers.through(ids).items())


def test_what_lies_beside_the_tables_is_counted_and_goes_with_its_adapter() -> None:
    pool = Layers().pool
    pool.pin(ADAPTERS[0])
    plain = pool.size_bytes
    pool.pin(ADAPTERS[3])
    replaced = sum(one.numel() * 4 for own in ADAPTERS[3].saved.values() for one in own.values())
    assert pool.size_bytes == plain + replaced
    pool.unpin(ADAPTERS[3].digest)
    assert pool.discard(ADAPTERS[3].digest)
    assert pool.size_bytes == plain
    assert not pool.extras


def test_modules_of_their_own_are_put_out_to_keep_the_budget() -> None:
    modules = Layers().modules
    one = Layers().pool
    one.pin(ADAPTERS[3])
    budget = one.size_bytes + 100
    pool = RankPool(GROUPS, SHAPES, dtype=torch.float32, device=CPU, budget_bytes=budget, modules=modules)
    twin = AdapterFactors("twin".ljust(64, "0"), ADAPTERS[3].modules, ADAPTERS[3].saved)
    pool.pin(ADAPTERS[3])
    pool.unpin(ADAPTERS[3].digest)
    pool.pin(twin)
    assert ADAPTERS[3].digest not in pool
    assert pool.evictions == 1
    pool.pin(ADAPTERS[3])  # both are in use, and what is in use is never put out
    assert len(pool) == 2
