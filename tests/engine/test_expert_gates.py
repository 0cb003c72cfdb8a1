"""Gates over fixed experts in the engine: each row equals a plain model with dense deltas, whatever is beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.strategies import STRATEGIES
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine import batch_lora
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import ModelSettings, load_base_model
from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.running import Model, Prefill, RunningRows, drop_places
from lora_hub_sdk.errors import ConfigurationError, UnsupportedRouteError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from lora_hub_sdk.types import Adapter, Member, Route, Sampling
from tests.engine.crowd import Tap
from tests.engine.test_gates import PROMPTS, Gate, _weighed
from tests.support import adapter_at, relative_error, route_of

EVERYTHING = (*ATTENTION, *MLP)
#: Mixed ranks and scales, rsLoRA, and experts without some of the modules and layers.
POOL: tuple[dict[str, Any], ...] = (
    {"rank": 4, "alpha": 16.0, "modules": EVERYTHING},
    {"rank": 1, "alpha": 8.0, "modules": MLP},
    {"rank": 6, "alpha": 12.0, "modules": ATTENTION, "rslora": True},
    {"rank": 3, "alpha": 12.0, "modules": EVERYTHING, "layers": (1,)},
    {"rank": 2, "alpha": 9.0, "modules": ("q_proj", "down_proj", "embed_tokens")},
)
#: A module that several experts have and the gates have no directions for.
WITHOUT = "model.layers.1.mlp.up_proj"


class Bench:
    def __init__(self, base: Path, folder: Path) -> None:
        folders = [tiny_adapter(folder / f"lora-{place}", base, seed=place, **spec) for place, spec in enumerate(POOL)]
        self.adapters = [adapter_at(path, base, id=place) for place, path in enumerate(folders)]
        self.factors = {adapter.digest: load_factors(adapter) for adapter in self.adapters}
        self.base = load_base_model(resolve_model(base), ModelSettings(dtype="float32"))
        self.plain: Any = load_base_model(resolve_model(base), ModelSettings(dtype="float32")).model
        self.gates = {strategy: self.gate(strategy, seed) for seed, strategy in enumerate(RULES)}
        self.ramole = Gate("ramole", dict(self.base.shapes), 1)

    def gate(self, strategy: str, seed: int) -> ExpertGate:
        """Random directions, steep enough that weights differ much from token to token and module to module."""
        draw = torch.Generator().manual_seed(seed)
        directions = {
            path: torch.randn(len(POOL), d_in, generator=draw) * 0.4
            for path, (_, d_in) in self.base.shapes.items()
            if path != WITHOUT
        }
        experts = {adapter.name: adapter.digest for adapter in self.adapters}
        return ExpertGate(strategy, "base", experts, directions, {"seed": seed})

    def route(self, strategy: str, places: Sequence[int] = range(len(POOL))) -> Route:
        members = tuple(Member(self.adapters[place], 1 / len(places)) for place in places)
        return Route(strategy, STRATEGIES[strategy].averaged if strategy in STRATEGIES else "outputs", members)

    @torch.inference_mode()
    def logits(self, route: Route, gate: ExpertGate | Gate | None, ids: Sequence[int], prompt: int) -> Tensor:
        """After each of the ids (l, vocabulary), of which the first ``prompt`` are the prompt's."""
        members = [(member.weight, self.factors[member.adapter.digest]) for member in route.members]
        names = list(gate.experts.values()) if isinstance(gate, ExpertGate) else []
        experts = [names.index(member.adapter.digest) for member in route.members] if names else []
        with ExitStack() as undo:
            for path, module in self.plain.named_modules():
                if path == self.base.embedding:
                    deltas = [(w, one.modules.get(path)) for w, one in members]
                    hook: Any = _embedded(route, deltas)
                elif path not in self.base.shapes:
                    continue
                elif isinstance(gate, Gate):
                    hook = _weighed(path, [one for _, one in members], gate)
                else:
                    own = gate.directions.get(path) if gate is not None else None
                    directions = None if own is None else own[experts]
                    hook = _adapted(path, members, route, gate, directions, prompt)
                undo.callback(module.register_forward_hook(hook).remove)
            found: Tensor = self.plain(torch.tensor([list(ids)])).logits[0]
        return found

    def greedy(self, route: Route, gate: ExpertGate | Gate | None, prompt: str, count: int) -> str:
        ids: Any = self.base.tokenizer(prompt).input_ids
        tokens: list[int] = []
        while len(tokens) < count and not (tokens and tokens[-1] in self.base.eos_ids):
            tokens.append(int(self.logits(route, gate, [*ids, *tokens], len(ids))[-1].argmax()))
        return str(self.base.tokenizer.decode(tokens, skip_special_tokens=True))


def weights_of(scores: Tensor, strategy: str) -> Tensor:
    """By the words of the papers, one place after the other: (l, n) -> (l, n)."""
    count = {"moe-top3": 3, "moe-top1": 1, "arrow": 3}.get(strategy, scores.shape[-1])
    found = torch.zeros_like(scores)
    for token, row in enumerate(scores.abs() if strategy == "arrow" else scores):
        best = row.argsort(descending=True)[:count]
        found[token, best] = row[best].softmax(0)
    return found


def _padded(members: Sequence[tuple[float, AdapterFactors]], path: str, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """A (n, r, d_in) and s B (n, d_out, r) with zeros where a member has nothing."""
    rank = max(one.rank for _, one in members)
    a, b = torch.zeros(len(members), rank, d_in), torch.zeros(len(members), d_out, rank)
    for place, (_, one) in enumerate(members):
        own = one.modules.get(path)
        if own is not None:
            a[place, : own.rank], b[place, :, : own.rank] = own.a, own.scale * own.b
    return a, b


def _adapted(
    path: str,
    members: Sequence[tuple[float, AdapterFactors]],
    route: Route,
    gate: ExpertGate | None,
    directions: Tensor | None,
    prompt: int,
) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0][0]
        if not members:
            return output
        a, b = _padded(members, path, x.shape[1], output.shape[-1])
        if gate is None:
            weights = torch.tensor([weight for weight, _ in members]).expand(len(x), -1)
        elif directions is None:
            weights = torch.full((len(x), len(members)), 1 / len(members))
        elif gate.strategy == "smear":
            weights = weights_of(x[:prompt].mean(0, keepdim=True) @ directions.T, "smear").expand(len(x), -1)
        else:
            weights = weights_of(x @ directions.T, gate.strategy)
        if route.averaged in ("parameters", "prompt"):
            delta = torch.einsum("n,nor->or", weights[0], b) @ torch.einsum("n,nrd->rd", weights[0], a)
            return output + x @ delta.T
        return output + torch.einsum("ln,nod,ld->lo", weights, b @ a, x)

    return hook


def _embedded(route: Route, deltas: Sequence[tuple[float, Any]]) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total = torch.zeros_like(output)
        for weight, one in deltas:
            if one is not None:
                share = weight if route.averaged in ("outputs", "parameters") else 1 / len(deltas)
                # Alone at its depths, a fused adapter has its weight twice.
                share = share**2 if route.averaged in ("parameters", "prompt") else share
                total = total + share * one.scale * (one.a.T[inputs[0]] @ one.b.T)
        return output + total

    return hook


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(base, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    engine = Engine(bench.base)
    for gate in bench.gates.values():
        engine.use_gate(gate)
    engine.use_gate(bench.ramole)
    yield engine
    engine.close()


def crowd(bench: Bench) -> list[tuple[Route, ExpertGate | Gate | None]]:
    """All kinds of rows."""
    mixed = route_of("mixture", (bench.adapters[0], 0.7), (bench.adapters[2], 0.4))
    fused = route_of("fusion", (bench.adapters[3], 0.7), (bench.adapters[2], -0.4))
    return [
        *((bench.route(strategy), gate) for strategy, gate in bench.gates.items()),
        (bench.route("ramole", (0, 2)), bench.ramole),
        (mixed, None),
        (fused, None),
        (route_of("base"), None),
        (bench.route("smear", (3, 0)), bench.gates["smear"]),
        (bench.route("moe-soft", (1, 2, 4)), bench.gates["moe-soft"]),
    ]


@torch.inference_mode()
@pytest.mark.parametrize(("reading", "stepping"), [("gather", "lookup"), ("dense", "dense"), ("gather", "gather")])
def test_rows_of_every_gate_in_one_batch_equal_dense_deltas_one_by_one(
    bench: Bench, reading: str, stepping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lora, "choose_form", lambda **at: stepping if at["tokens"] == 1 else reading)
    pool = RankPool.of(bench.base, 1 << 24)
    model, asked = Model(bench.base, pool), crowd(bench)
    pool.use_gates([*bench.gates.values(), bench.ramole])
    ranks = {digest: one.rank for digest, one in bench.factors.items()}
    rows = []
    for route, gate in asked:
        terms = terms_of(route, ranks)
        own = tuple(row for digest in terms.digests for row in pool.pin(bench.factors[digest]))
        digest = None if gate is None else gate.digest
        rows.append(RowLora(terms, own, digest, {} if route.averaged == "prompt" else None))
    prompts: Any = bench.base.tokenizer([PROMPTS[at % 4] + "x" * at for at in range(len(asked))]).input_ids
    prefill, running = Prefill(model, prompts, rows), RunningRows(model)
    read = prefill.advance(16)
    assert read is not None, "rows that need their whole prompts have all of them read at once"
    found = [read]
    running.join(prefill, range(len(rows)))
    for step in range(3):
        found.append(running.step([7 + step] * len(asked)))
        if step == 0:  # rows leave and change places, and the others keep their weights
            running.drop([0])
            drop_places(asked, [0])
            drop_places(prompts, [0])
            found = [torch.cat([one[-1:], one[1:-1]]) for one in found]
    for place, (route, gate) in enumerate(asked):
        ids = prompts[place]
        want = bench.logits(route, gate, [*ids, 7, 8, 9], len(ids))[len(ids) - 1 :]
        have = torch.stack([one[place] for one in found])
        assert relative_error(have, want) < 1e-4, (place, route.strategy)


def test_answers_in_a_crowd_are_those_of_each_prompt_alone(bench: Bench, engine: Engine) -> None:
    sampling, asked = Sampling(max_new_tokens=6), crowd(bench)
    requests = [Request(prompt, route, sampling, template=None) for prompt in PROMPTS[1:3] for route, _ in asked]
    together = [one.text for one in engine.generate(requests)]
    assert together == [bench.greedy(route, gate, prompt, 6) for prompt in PROMPTS[1:3] for route, gate in asked]
    by_strategy = {route.strategy: text for (route, _), text in zip(asked[:7], together[11:18], strict=True)}
    assert len(set(by_strategy.values())) > 4, "strategies that all say the same would show nothing"


def test_a_long_prompt_weighed_as_a_whole_is_read_in_one_piece_while_others_decode(
    bench: Bench, engine: Engine
) -> None:
    long, smear = "so long a prompt that it would be read in pieces " * 3, bench.route("smear")
    engine._worker._piece = 8
    first = engine.submit(Request("a", bench.route("moe-soft"), Sampling(24), template=None), stream=True)
    next(iter(first.pieces()))  # it decodes
    other = Request(long, bench.route("moe-top3"), Sampling(3), template=None)
    tickets = engine.submit_many([Request(long, smear, Sampling(3), template=None), other])
    assert tickets[0].result().text == bench.greedy(smear, bench.gates["smear"], long, 3)
    assert tickets[1].result().text == bench.greedy(other.route, bench.gates["moe-top3"], long, 3)


def test_a_row_that_is_placed_again_keeps_what_was_found_for_its_prompt(bench: Bench, engine: Engine) -> None:
    route, gate = bench.route("smear"), bench.gates["smear"]
    tap = Tap(engine)

    def now_and_then(batch: BatchLora) -> None:
        if len(tap.sizes) in (4, 7, 9) and len(batch.rows) > 1:
            raise MemoryError

    tap.before = now_and_then
    found = engine.generate([Request(prompt, route, Sampling(8), template=None) for prompt in PROMPTS])
    assert engine.stats().splits > 0
    assert [one.text for one in found] == [bench.greedy(route, gate, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("strategy", ["moe-top1", "smear"])
def test_a_new_gate_is_for_new_requests_and_those_before_keep_theirs(
    bench: Bench, engine: Engine, strategy: str
) -> None:
    other = bench.gate(strategy, 77)
    want = [bench.greedy(bench.route(strategy), gate, PROMPTS[2], 10) for gate in (bench.gates[strategy], other)]
    assert want[0] != want[1]
    request = Request(PROMPTS[2], bench.route(strategy), Sampling(10), template=None)
    tickets = [engine.submit(request)]
    engine.use_gate(other)
    tickets.append(engine.submit(request))
    assert [ticket.result().text for ticket in tickets] == want
    assert engine.gates.keys() == {*RULES, "ramole"}, "one for each strategy"


def test_a_gate_is_taken_away_alone_or_with_all_others(bench: Bench, engine: Engine) -> None:
    engine.use_gate(None, strategy="smear")
    assert engine.gates.keys() == {*RULES, "ramole"} - {"smear"}
    with pytest.raises(ConfigurationError, match=r"'smear' needs a gate.*hub\.train_experts"):
        engine.submit(Request("a", bench.route("smear"), Sampling(2)))
    engine.submit(Request("a", bench.route("arrow"), Sampling(2))).result()
    engine.use_gate(None)
    assert engine.gates == {}


def test_routes_that_a_gate_cannot_weigh_are_refused_by_name(
    bench: Bench, engine: Engine, base: Path, tmp_path: Path
) -> None:
    stranger: Adapter = adapter_at(tiny_adapter(tmp_path / "stranger", base, seed=9), base)
    route = bench.route("moe-soft")
    with pytest.raises(ConfigurationError, match="'stranger' is no expert"):
        engine.submit(Request("a", replace(route, members=(*route.members, Member(stranger, 0.5)))))
    with pytest.raises(ConfigurationError, match="averaged by 'tokens', found 'prompt'"):
        engine.submit(Request("a", replace(route, averaged="prompt")))
    with pytest.raises(ConfigurationError, match="is for 'smear'"):
        engine.use_gate(bench.gates["smear"], strategy="arrow")
    smear = bench.gates["smear"]
    path = next(iter(smear.directions))
    wrong = ExpertGate("smear", "base", smear.experts, {path: torch.ones(len(POOL), 3)})
    with pytest.raises(ConfigurationError, match="reads 3 inputs"):
        engine.use_gate(wrong)
    assert engine.gates["smear"] is smear
    dora = adapter_at(tiny_adapter(tmp_path / "dora", base, dora=True), base)
    engine.use_gate(replace(smear, experts={dora.name: dora.digest}, directions={path: smear.directions[path][:1]}))
    with pytest.raises(UnsupportedRouteError, match=r"'dora' has a gain"):
        engine.submit(Request("a", Route("smear", "prompt", (Member(dora, 1.0),)))).result()


def test_gates_that_nobody_uses_any_more_leave_the_pool(bench: Bench) -> None:
    pool, gates = RankPool.of(bench.base, 1 << 24), bench.gates
    own = bench.factors[bench.adapters[0].digest]
    pool.use_gates([gates["arrow"], gates["smear"], bench.ramole])
    pool.pin(own)
    pool.use_gates([gates["arrow"], bench.ramole])
    assert gates["smear"].digest in pool.gates, "a row may still have it"
    pool.compact()
    assert gates["smear"].digest in pool.gates
    pool.unpin(own.digest)
    before = pool.size_bytes
    pool.compact()
    assert pool.gates.keys() == {gates["arrow"].digest, bench.ramole.digest}
    assert {digest for table in pool.tables.values() for digest in table.experts} == {gates["arrow"].digest}
    assert pool.size_bytes < before


@torch.inference_mode()
def test_arrow_equals_peft(bench: Bench, base: Path, tmp_path: Path) -> None:
    """By PEFT's own directions, which its power iteration finds but roughly."""
    from peft import ArrowConfig, create_arrow_model
    from transformers import AutoModelForCausalLM

    folders = [tiny_adapter(tmp_path / f"t{seed}", base, seed=seed, rank=4, alpha=20.0) for seed in range(6)]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft: Any = create_arrow_model(plain, [str(folder) for folder in folders], ArrowConfig(top_k=3))
    ids: Any = bench.base.tokenizer(PROMPTS).input_ids
    want = [peft(torch.tensor([[*one, 7]])).logits[0, -2:] for one in ids]
    directions = {
        path.removeprefix("base_model.model.").removesuffix(".lora_arrow.arrow_router"): module.prototypes
        for path, module in peft.named_modules()
        if hasattr(module, "prototypes")
    }
    adapters = [adapter_at(folder, base, id=place) for place, folder in enumerate(folders)]
    gate = ExpertGate("arrow", "base", {one.name: one.digest for one in adapters}, directions)
    pool = RankPool.of(bench.base, 1 << 24)
    model = Model(bench.base, pool)
    pool.use_gates([gate])
    route = Route("arrow", "tokens", tuple(Member(one, 1 / 6) for one in adapters))
    terms = terms_of(route, {one.digest: 4 for one in adapters})
    ranks = tuple(row for one in adapters for row in pool.pin(load_factors(one)))
    prefill, running = Prefill(model, ids, [RowLora(terms, ranks, gate.digest)] * len(ids)), RunningRows(model)
    read = prefill.advance(1 << 20)
    assert read is not None
    running.join(prefill, range(len(ids)))
    found = torch.stack([read, running.step([7] * len(ids))], 1)
    assert relative_error(found, torch.stack(want)) < 1e-4
