"""Every system against its definition in plain torch (``reference.py``): routes, logits, tokens, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate
from lora_hub_sdk.composition.ramole import Ramole, RouterLora
from lora_hub_sdk.engine._gate_forward import FactorBank, GateBatch, GatedForward
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Averaged, Routing, Sampling
from tests.evaluation import reference
from tests.evaluation.bench import TOKENS, Bench, by_experts
from tests.evaluation.bench import bench as bench
from tests.evaluation.pool import Words, add_twin, make_pool
from tests.evaluation.reference import Delta, Lora, Plain
from tests.support import relative_error

STATIC: dict[str, tuple[Routing, Callable[..., Delta]]] = {
    "base": (Routing("base"), reference.mixture),
    "selection": (Routing("selection"), reference.mixture),
    "mixture": (Routing("mixture"), reference.mixture),
    "similarity": (Routing("mixture", weights="similarity"), reference.mixture),
    "fusion": (Routing("fusion", k=4), reference.fusion),
    "weighed fusion": (
        Routing("fusion", adapters=("past", "german", "mood"), adapter_weights=(0.9, -1.2, 0.4)),
        reference.fusion,
    ),
    # Both factors are weighed: a quarter of its output.
    "one weighed": (Routing("fusion", adapters=("plural",), adapter_weights=(0.5,)), reference.fusion),
    "weighed mixture": (
        Routing("mixture", adapters=("rhyme", "german"), adapter_weights=(0.3, 0.7)),
        reference.mixture,
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_routes_answer_as_the_papers_formulas(bench: Bench, name: str) -> None:
    routing, formula = STATIC[name]
    prompts = bench.prompts
    routes = bench.pool.hub.route(prompts, base_model=bench.pool.base, routing=routing)
    bench.check(prompts, [routing] * len(prompts), [formula(*bench.of(route)) for route in routes])


def routers(bench: Bench, width: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Random, and sharp enough that weights are far from alike."""
    draw = torch.Generator().manual_seed(5)
    return {
        path: (
            torch.randn(width, module.in_features, generator=draw),
            torch.randn(module.out_features, width, generator=draw),
        )
        for path, module in bench.plain.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def batch_of(bench: Bench, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> GateBatch:
    engine = bench.pool.hub.engine(bench.pool.base)
    return GateBatch.of(rows, engine.base.pad_id, engine.base.device)


ROWS = [([5, 60, 7], [80, 9]), ([11, 12, 130, 14, 15], [16]), ([20], [21, 220, 23])]


def test_ramole_answers_as_its_formula(bench: Bench) -> None:
    gate = routers(bench)
    name = bench.pool.hub.list()[0].base_model
    bench.pool.hub.use_gate(Ramole(name, {path: RouterLora(*pair) for path, pair in gate.items()}))
    prompts = bench.prompts
    routing = Routing("ramole", k=4)
    routes = bench.pool.hub.route(prompts, base_model=bench.pool.base, routing=routing)
    bench.check(prompts, [routing] * len(prompts), [reference.ramole(bench.of(route)[0], gate) for route in routes])


def test_ramoles_losses_and_gradients_are_autograds_through_its_formula(bench: Bench) -> None:
    names = list(bench.loras)
    members = [(0, 2, 4), (1, 3), (5, 0, 1, 2)]
    base = bench.pool.hub.engine(bench.pool.base).base
    bank = FactorBank([load_factors(bench.pool.hub.get(name)) for name in names], base)
    ours = {path: tuple(part.requires_grad_() for part in pair) for path, pair in routers(bench).items()}
    theirs = {path: tuple(part.clone().detach().requires_grad_() for part in pair) for path, pair in ours.items()}
    found = GatedForward(base, bank).losses(batch_of(bench, ROWS), members, ours)  # type: ignore[arg-type]
    want = torch.stack(
        [
            bench.plain.loss(prompt, answer, reference.ramole(bench.several(*(names[one] for one in row)), theirs))  # type: ignore[arg-type]
            for (prompt, answer), row in zip(ROWS, members, strict=True)
        ]
    )
    same(
        found,
        want,
        [part for pair in ours.values() for part in pair],
        [part for pair in theirs.values() for part in pair],
    )


def same(found: Tensor, want: Tensor, ours: Sequence[Tensor], theirs: Sequence[Tensor], *, moves: bool = True) -> None:
    """Rows' losses and the gradients of parameters, at least one of which is something unless nothing moves."""
    share = torch.linspace(0.5, 1.5, len(found))
    (found * share).sum().backward()  # type: ignore[no-untyped-call]
    (want * share).sum().backward()  # type: ignore[no-untyped-call]
    assert relative_error(found, want) < 1e-5
    size = max(float(one.grad.abs().max()) for one in theirs if one.grad is not None)
    assert (size > 1e-4) == moves
    for mine, other in zip(ours, theirs, strict=True):
        nothing = torch.zeros_like(other)
        torch.testing.assert_close(
            nothing if mine.grad is None else mine.grad,
            nothing if other.grad is None else other.grad,
            rtol=1e-3,
            atol=1e-5 * size if moves else 1e-4,
        )


def test_equal_content_under_two_names_counts_twice(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path, base)
    with pool.hub:
        add_twin(pool, "twin", "french", ["something else"])
        plain, lora = Plain(base), Lora.read(pool.folders["french"])
        mood = Lora.read(pool.folders["mood"])
        prompt = "Translate house to French"
        for strategy, formula in (("mixture", reference.mixture), ("fusion", reference.fusion)):
            routing = Routing(strategy, adapters=("french", "twin", "mood"), adapter_weights=(0.5, 0.7, 0.4))
            found = pool.hub.generate([prompt], base_model=base, routing=routing, sampling=Sampling(TOKENS))
            assert found[0].text == plain.answer(prompt, formula([lora, lora, mood], [0.5, 0.7, 0.4]), TOKENS)[0]


def gate_over(bench: Bench, strategy: str, names: Sequence[str], seed: int = 3) -> ExpertGate:
    """Random directions wherever one of the experts has something, but for one such module."""
    draw = torch.Generator().manual_seed(seed)
    paths = sorted({path for name in names for path in bench.loras[name].factors})
    left_out = paths[1] if RULES[strategy].top_k is None else ""
    widths = {path: module.in_features for path, module in bench.plain.model.named_modules() if path in paths}
    directions = {path: torch.randn(len(names), widths[path], generator=draw) for path in paths if path != left_out}
    adapters = {name: bench.pool.hub.get(name) for name in names}
    base_model = adapters[names[0]].base_model
    return ExpertGate(strategy, base_model, {name: one.digest for name, one in adapters.items()}, directions)


FIVE = ("french", "german", "plural", "past", "mood")


@pytest.mark.parametrize("strategy", RULES)
def test_gates_over_experts_answer_as_their_formulas(bench: Bench, strategy: str) -> None:
    gate = gate_over(bench, strategy, FIVE)
    bench.pool.hub.use_gate(gate)
    prompts = bench.prompts
    some = FIVE[3:0:-1]
    routings = [Routing(strategy, adapters=some if place % 2 else None) for place in range(len(prompts))]
    whole, part = by_experts(bench, gate), by_experts(bench, gate, some)
    bench.check(prompts, routings, [part if place % 2 else whole for place in range(len(prompts))])
    route = bench.pool.hub.route(prompts[:1], base_model=bench.pool.base, routing=routings[0])[0]
    assert [(one.adapter.name, one.weight) for one in route.members] == [(name, 1 / 5) for name in FIVE]


def test_rows_of_all_systems_in_one_batch_are_what_they_are_alone(bench: Bench) -> None:
    hub = bench.pool.hub
    name = hub.list()[0].base_model
    hub.use_gate(Ramole(name, {path: RouterLora(*pair) for path, pair in routers(bench).items()}))
    for strategy in RULES:
        hub.use_gate(gate_over(bench, strategy, FIVE))
    routings = [*(routing for routing, _ in STATIC.values()), Routing("ramole"), *map(Routing, RULES)]
    prompts = bench.prompts
    asked = [(prompt, routing) for place, prompt in enumerate(prompts) for routing in routings[place % 2 :: 2]]
    together = bench.texts([prompt for prompt, _ in asked], [routing for _, routing in asked])
    assert together == [bench.texts([prompt], routing)[0] for prompt, routing in asked]


def test_arrow_with_its_own_directions_is_pefts(base: Path, tmp_path: Path) -> None:
    # PEFT finds directions by 15 rounds of a power iteration, which are exact for rank 1 alone, and mixes no ranks.
    names = [f"lora-{seed}" for seed in range(4)]
    folders = [
        tiny_adapter(tmp_path / name, base, seed=seed, rank=1, alpha=4.0 + seed) for seed, name in enumerate(names)
    ]
    plain = Plain(base)
    loras = [Lora.read(folder) for folder in folders]
    delta = reference.experts(loras, reference.first_right(loras), top=3, absolute=True)
    model = create_arrow_model(
        AutoModelForCausalLM.from_pretrained(base), list(map(str, folders)), ArrowConfig(top_k=3)
    )
    ids = plain.tokenizer("Translate house to French").input_ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
        assert relative_error(plain.logits(ids, delta, len(ids)), theirs) < 1e-4
    with LoraHub(tmp_path / "hub.db", index="exact", encoder=Words("words"), cache_dir=tmp_path / "cache") as hub:
        for name, folder in zip(names, folders, strict=True):
            hub.register(folder, base_model=base, samples=[name])
        hub.train_experts(strategy="arrow", base_model=base, output=tmp_path / "arrow", experts=names)
        hub.use_gate(tmp_path / "arrow")
        found = hub.generate(
            ["Translate house to French"], base_model=base, routing=Routing("arrow"), sampling=Sampling(6)
        )
    assert found[0].text == plain.answer("Translate house to French", delta, 6)[0]


def test_arrows_directions_are_the_first_right_singular_vectors(bench: Bench, tmp_path: Path) -> None:
    names = list(bench.loras)
    bench.pool.hub.train_experts(strategy="arrow", base_model=bench.pool.base, output=tmp_path / "arrow", experts=names)
    gate = ExpertGate.load(tmp_path / "arrow")
    want = reference.first_right(bench.several(*names))
    assert gate.directions.keys() == want.keys()
    for path, rows in want.items():
        torch.testing.assert_close(
            (gate.directions[path] * rows).sum(-1).abs(), rows.norm(dim=-1), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(gate.directions[path].norm(dim=-1), rows.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noisy", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("strategy", [name for name in RULES if name != "arrow"])
def test_losses_and_gradients_of_routers_are_autograds_through_the_formula(
    bench: Bench, strategy: str, noisy: bool
) -> None:
    rule = RULES[strategy]
    given = gate_over(bench, strategy, FIVE).directions
    ours = {path: rows.clone().requires_grad_() for path, rows in given.items()}
    theirs = {path: rows.clone().requires_grad_() for path, rows in given.items()}
    batch, loras = batch_of(bench, ROWS), bench.several(*FIVE)
    directions = {path: torch.zeros(5, one.in_features) for path, one in bench.linears.items()} | theirs
    draw = torch.Generator().manual_seed(1)
    # One draw for each score of the padded batch, in the order in which the modules compute.
    gumbel = {
        path: -torch.empty(*batch.ids.shape, 5).exponential_(generator=draw).log()
        for path in bench.linears
        if path in given
    }

    def loss(row: int) -> Tensor:
        if rule.per == "prompt":
            delta = reference.smear(loras, directions)
        else:
            noise = {path: each[row] for path, each in gumbel.items()} if noisy and rule.top_k else None
            delta = reference.experts(loras, directions, top=rule.top_k, noise=noise)
        return bench.plain.loss(*ROWS[row], delta)

    found = bench.expert_forward(FIVE).losses(batch, ours, rule, torch.Generator().manual_seed(1) if noisy else None)
    want = torch.stack(list(map(loss, range(len(ROWS)))))
    # The softmax over one expert is 1, whatever its score: only noise makes it learn.
    same(found, want, list(ours.values()), list(theirs.values()), moves=noisy or rule.top_k != 1)


@pytest.mark.parametrize("formula", [reference.mixture, reference.fusion])
def test_losses_under_fixed_weights_are_the_formulas(bench: Bench, formula: Callable[..., Delta]) -> None:
    weights = [0.8, -0.6, 0.0, 1.3, 0.2]
    averaged: Averaged = "outputs" if formula is reference.mixture else "parameters"
    found = bench.expert_forward(FIVE).fixed_losses(batch_of(bench, ROWS), weights, averaged)
    with torch.no_grad():
        want = torch.stack([bench.plain.loss(*row, formula(bench.several(*FIVE), weights)) for row in ROWS])
    assert relative_error(found, want) < 1e-5
