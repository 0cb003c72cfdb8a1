"""The engine with a gate: rows weighed token by token equal a plain model with every adapter's output in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.reference import ramole_einsum
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.batch_lora import RowLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.running import Model, Prefill, RunningRows
from lora_hub_sdk.errors import ConfigurationError, UnsupportedRouteError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from lora_hub_sdk.types import Adapter, Member, Route, Sampling
from tests.support import adapter_at, relative_error, route_of

EVERYTHING = (*ATTENTION, *MLP)
POOL: tuple[dict[str, Any], ...] = (
    {"rank": 4, "alpha": 8.0, "modules": EVERYTHING},
    {"rank": 1, "alpha": 4.0, "modules": MLP},
    {"rank": 6, "alpha": 6.0, "modules": ATTENTION, "rslora": True},
    {"rank": 3, "alpha": 6.0, "modules": EVERYTHING, "layers": (1,)},
)
PROMPTS = ["a", "some longer prompt", "the third one, which is longer than the others", "b c d e"]


@dataclass(frozen=True)
class Gate:
    """Random, and sharp enough that weights differ much from token to token."""

    digest: str
    shapes: dict[str, tuple[int, int]]
    seed: int
    width: int = 4
    strategy: str = "ramole"
    modules: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        for path, (d_out, d_in) in self.shapes.items():
            if "lm_head" not in path:
                self.modules[path] = (
                    torch.randn(self.width, d_in, generator=draw),
                    torch.randn(d_out, self.width, generator=draw),
                )

    def module(self, path: str) -> tuple[Tensor, Tensor] | None:
        return self.modules.get(path)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / self.width**0.5, -1).nan_to_num(0.0)


class Bench:
    def __init__(self, base: Path, folder: Path) -> None:
        folders = [tiny_adapter(folder / f"lora-{place}", base, seed=place, **spec) for place, spec in enumerate(POOL)]
        self.adapters = [adapter_at(path, base, id=place) for place, path in enumerate(folders)]
        self.factors = {adapter.digest: load_factors(adapter) for adapter in self.adapters}
        self.base = load_base_model(resolve_model(base), ModelSettings(dtype="float32"))
        self.first, self.second = (Gate(f"gate-{seed}", dict(self.base.shapes), seed) for seed in (1, 2))
        self.plain: Any = load_base_model(resolve_model(base), ModelSettings(dtype="float32")).model

    def gated(self, *places: int) -> Route:
        return Route("ramole", "tokens", tuple(Member(self.adapters[place], 1 / len(places)) for place in places))

    @torch.inference_mode()
    def expected(self, route: Route, gate: Gate, ids: Sequence[int]) -> Tensor:
        """Logits after each of the ids, (l, vocabulary), by hooks on a plain model."""
        members = [self.factors[member.adapter.digest] for member in route.members]
        with ExitStack() as undo:
            for path, module in self.plain.named_modules():
                if path in self.base.shapes:
                    undo.callback(module.register_forward_hook(_weighed(path, members, gate)).remove)
            found: Tensor = self.plain(torch.tensor([list(ids)])).logits[0]
        return found

    def greedy(self, route: Route, gate: Gate, prompt: str, count: int) -> str:
        ids: Any = self.base.tokenizer(prompt).input_ids
        tokens: list[int] = []
        while len(tokens) < count and not (tokens and tokens[-1] in self.base.eos_ids):
            tokens.append(int(self.expected(route, gate, [*ids, *tokens])[-1].argmax()))
        return str(self.base.tokenizer.decode(tokens, skip_special_tokens=True))


def _weighed(path: str, members: Sequence[AdapterFactors], gate: Gate) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rank = max(one.rank for one in members)
        a = torch.zeros(len(members), rank, inputs[0].shape[-1])
        b = torch.zeros(len(members), output.shape[-1], rank)
        for place, one in enumerate(members):
            own = one.modules.get(path)
            if own is not None:
                a[place, : own.rank], b[place, :, : own.rank] = own.a, own.scale * own.b
        found = gate.module(path) or (torch.zeros(1, a.shape[2]), torch.zeros(b.shape[1], 1))
        return output + ramole_einsum(inputs[0], a, b, torch.ones(1, len(members), dtype=torch.bool), *found)

    return hook


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(base, tmp_path_factory.mktemp("gates"))


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    engine = Engine(bench.base)
    yield engine
    engine.close()


def fresh(base: BaseModel) -> tuple[RankPool, Model]:
    pool = RankPool.of(base, 1 << 24)
    return pool, Model(base, pool)


@torch.inference_mode()
def test_logits_of_gated_rows_beside_static_ones_equal_the_reference(bench: Bench) -> None:
    pool, model = fresh(bench.base)
    pool.use_gates([bench.first])
    routes = [bench.gated(0, 1, 2), bench.gated(3), bench.gated(0, 3), route_of("mixture", (bench.adapters[2], 0.7))]
    rows = []
    for route in routes:
        terms = terms_of(route, {digest: one.rank for digest, one in bench.factors.items()})
        ranks = tuple(row for digest in terms.digests for row in pool.pin(bench.factors[digest]))
        rows.append(RowLora(terms, ranks, bench.first.digest if terms.gated else None))
    ids: Any = bench.base.tokenizer(PROMPTS).input_ids
    prefill, running = Prefill(model, ids, rows), RunningRows(model)
    read = prefill.advance(1 << 20)
    running.join(prefill, range(len(rows)))
    stepped = running.step([7] * len(rows))
    assert read is not None
    for row, route in enumerate(routes[:3]):
        want = bench.expected(route, bench.first, [*ids[row], 7])
        assert relative_error(read[row], want[-2]) < 1e-4
        assert relative_error(stepped[row], want[-1]) < 1e-4


def test_gated_answers_are_those_of_the_reference_and_static_neighbours_get_their_own(
    bench: Bench, engine: Engine
) -> None:
    sampling = Sampling(max_new_tokens=6)
    static = [Request(prompt, route_of("mixture", (bench.adapters[2], 0.7)), sampling) for prompt in PROMPTS]
    alone = [one.text for one in engine.generate(static)]
    engine.use_gate(bench.first)
    gated = [Request(prompt, bench.gated(0, 1, 2), sampling) for prompt in PROMPTS]
    together = [one.text for one in engine.generate([*gated, *static])]
    assert together[4:] == alone
    assert together[:4] == [bench.greedy(bench.gated(0, 1, 2), bench.first, prompt, 6) for prompt in PROMPTS]


def test_a_new_gate_is_for_new_requests_and_those_before_keep_theirs(bench: Bench, engine: Engine) -> None:
    route, sampling = bench.gated(0, 1, 2), Sampling(max_new_tokens=12)
    want = {gate.digest: bench.greedy(route, gate, PROMPTS[1], 12) for gate in (bench.first, bench.second)}
    assert want[bench.first.digest] != want[bench.second.digest]
    tickets = []
    for gate in (bench.first, bench.second, bench.first):
        engine.use_gate(gate)
        tickets.append((gate.digest, engine.submit(Request(PROMPTS[1], route, sampling))))
    for digest, ticket in tickets:
        assert ticket.result().text == want[digest]


def test_a_gated_route_without_a_gate_is_refused_before_anything_starts(bench: Bench, engine: Engine) -> None:
    with pytest.raises(ConfigurationError, match=r"needs a gate for base model .* hub\.train_gate"):
        engine.submit(Request("a", bench.gated(0), Sampling(max_new_tokens=2)))
    engine.use_gate(bench.first)
    engine.use_gate(None)
    with pytest.raises(ConfigurationError, match="needs a gate"):
        engine.submit(Request("a", bench.gated(0), Sampling(max_new_tokens=2)))


def test_a_gate_of_another_base_is_refused(bench: Bench, engine: Engine) -> None:
    shapes = dict(bench.base.shapes)
    path = next(iter(shapes))
    shapes[path] = (shapes[path][0] + 1, shapes[path][1])
    with pytest.raises(ConfigurationError, match="trained for another base"):
        engine.use_gate(Gate("other", shapes, 1))
    assert engine.gates == {}


@pytest.mark.parametrize(
    ("spec", "kept"),
    [({"dora": True}, "a gain"), ({"modules_to_save": ("norm",)}, "modules of its own")],
    ids=["DoRA", "modules_to_save"],
)
def test_an_adapter_that_no_gate_can_weigh_is_refused_by_name_and_neighbours_answer(
    bench: Bench, engine: Engine, base: Path, tmp_path: Path, spec: dict[str, Any], kept: str
) -> None:
    other: Adapter = adapter_at(tiny_adapter(tmp_path / "other", base, **spec), base)
    engine.use_gate(bench.first)
    sampling = Sampling(max_new_tokens=3)
    good = engine.submit(Request("a", bench.gated(0, 1), sampling))
    route = Route("ramole", "tokens", (Member(bench.adapters[0], 0.5), Member(other, 0.5)))
    bad = engine.submit(Request("a", route, sampling))
    with pytest.raises(UnsupportedRouteError, match=f"'other' has {kept}"):
        bad.result()
    assert good.result().text == bench.greedy(bench.gated(0, 1), bench.first, "a", 3)
    mixed = Route("mixture", "outputs", route.members)
    assert engine.generate([Request("a", mixed, sampling)])[0].usage.completion_tokens > 0
