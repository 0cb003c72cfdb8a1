"""Gates over experts on a tiny model: their forward and gradient against plain torch, and their training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate, GateRule
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.engine import expert_training
from lora_hub_sdk.engine._gate_forward import GateBatch
from lora_hub_sdk.engine._gate_rows import plan_rows
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel, load_base_model
from lora_hub_sdk.engine.expert_forward import ExpertForward
from lora_hub_sdk.engine.expert_training import ExpertTrainer
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from lora_hub_sdk.types import Routing, Sampling
from tests.support import adapter_at, relative_error

TRAINED = ("moe-soft", "moe-top3", "moe-top1", "smear")
#: Ranks 1 to 7, rsLoRA, modules and a layer missing.
EXPERTS: tuple[dict[str, Any], ...] = (
    {"rank": 3, "alpha": 12.0, "modules": (*ATTENTION, *MLP)},
    {"rank": 1, "alpha": 4.0, "modules": ("q_proj", "v_proj", "down_proj")},
    {"rank": 4, "alpha": 8.0, "modules": ATTENTION, "rslora": True},
    {"rank": 2, "alpha": 8.0, "modules": (*MLP, "q_proj"), "rank_pattern": {"q_proj": 7}},
    {"rank": 5, "alpha": 10.0, "modules": ("o_proj", "lm_head")},
)
#: Prompt and answer of different lengths, so that each row but one is padded.
ROWS: list[tuple[list[int], list[int]]] = [([5, 6, 7], [8, 9]), ([11, 12, 13, 14, 15], [16]), ([20], [21, 22, 23])]
SMALL = ExpertTrainer(steps=4, batch=4, check_every=2, answer_tokens=6, validation=0.25)
WORDS = ("oak", "lamp", "stone", "paper", "river", "cloud")
ASKED = {"french": "Translate {} to French", "plural": "The plural of {}", "mood": "Is {} good or bad?"}


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(resolve_model(base))


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFactors]:
    folder = tmp_path_factory.mktemp("experts")
    made = [tiny_adapter(folder / str(seed), base, seed=seed, **one) for seed, one in enumerate(EXPERTS)]
    return [load_factors(adapter_at(one, base)) for one in made]


def random_directions(forward: ExpertForward) -> dict[str, Tensor]:
    """Sharp ones; one module has none."""
    draw = torch.Generator().manual_seed(7)
    found = {path: torch.randn(len(EXPERTS), d_in, generator=draw) for path, d_in in forward.inputs.items()}
    del found["model.layers.0.self_attn.q_proj"]
    return {path: tensor.requires_grad_() for path, tensor in found.items()}


class PlainTorch:
    """The definitions, one row at a time, with dense deltas in hooks."""

    def __init__(self, base: BaseModel, experts: Sequence[AdapterFactors]) -> None:
        self._model: Any = base.model
        self._modules, self._count = base.modules, len(experts)
        paths = {path for one in experts for path in one.modules}
        self._factors = {path: [one.modules.get(path) for one in experts] for path in paths}

    def losses(
        self, rows: Sequence[tuple[list[int], list[int]]], directions: Mapping[str, Tensor], rule: GateRule, seed: int
    ) -> Tensor:
        noise = self._noise(rows, rule, seed)
        found = []
        for number, (prompt, answer) in enumerate(rows):
            hooks = [
                self._modules[path].register_forward_hook(
                    self._hook(path, directions.get(path), rule, len(prompt), noise[path][number] if noise else None)
                )
                for path in self._factors
            ]
            scores = self._model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            for hook in hooks:
                hook.remove()
            found.append(-torch.stack([scores[len(prompt) - 1 + n, token] for n, token in enumerate(answer)]).mean())
        return torch.stack(found)

    def _noise(self, rows: Sequence[tuple[list[int], list[int]]], rule: GateRule, seed: int) -> dict[str, Tensor]:
        """Gumbel noise as it is drawn: module by module in the order of the pass, (b, l, n) each."""
        if rule.top_k is None:
            return {}
        order: list[str] = []
        hooks = [
            self._modules[path].register_forward_hook(lambda *_, path=path: order.append(path))
            for path in self._factors
        ]
        self._model(torch.tensor([[1]]))
        for hook in hooks:
            hook.remove()
        draw = torch.Generator().manual_seed(seed)
        shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in rows), self._count)
        return {path: -torch.empty(shape).exponential_(generator=draw).log() for path in order}

    def _hook(
        self, path: str, directions: Tensor | None, rule: GateRule, prompt: int, noise: Tensor | None
    ) -> Callable[..., Tensor]:
        def weights(x: Tensor, extra: Tensor | None) -> Tensor:
            scores = torch.zeros(self._count) if directions is None else directions @ x
            if extra is None or rule.top_k is None:
                return scores.softmax(0)
            scores = scores + extra
            best = sorted(range(self._count), key=lambda one: -float(scores[one].detach()))[: rule.top_k]
            hard = torch.zeros(self._count)
            hard[best] = scores.detach()[best].softmax(0)
            soft = scores.softmax(0)
            straight: Tensor = soft + (hard - soft).detach()
            return straight

        def add(_module: object, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x = inputs[0][0]
            held = [(n, one) for n, one in enumerate(self._factors[path]) if one is not None]
            if rule.per == "prompt":
                found = weights(x[:prompt].mean(0), None)
                deepest = max(one.rank for _, one in held)
                a: Any = sum(
                    found[n] * torch.cat([one.a, torch.zeros(deepest - one.rank, one.a.shape[1])]) for n, one in held
                )
                b: Any = sum(
                    found[n] * one.scale * torch.cat([one.b, torch.zeros(len(one.b), deepest - one.rank)], 1)
                    for n, one in held
                )
                fused: Tensor = x @ (b @ a).T
                return output + fused[None]
            deltas = {n: one.scale * one.b @ one.a for n, one in held}
            rows = []
            for place, token in enumerate(x):
                found = weights(token, None if noise is None else noise[place])
                rows.append(sum((found[n] * (delta @ token) for n, delta in deltas.items()), torch.zeros(())))
            return output + torch.stack(rows)[None]

        return add


@pytest.mark.parametrize("strategy", TRAINED)
def test_losses_and_gradients_are_those_of_the_definitions(
    loaded: BaseModel, experts: list[AdapterFactors], strategy: str
) -> None:
    forward, rule = ExpertForward(loaded, experts), RULES[strategy]
    directions = random_directions(forward)
    copies = {path: tensor.detach().clone().requires_grad_() for path, tensor in directions.items()}
    own = forward.losses(GateBatch.of(ROWS, 0, loaded.device), directions, rule, torch.Generator().manual_seed(3))
    expected = PlainTorch(loaded, experts).losses(ROWS, copies, rule, 3)
    assert relative_error(own, expected) < 1e-5
    own.sum().backward()  # type: ignore[no-untyped-call]
    expected.sum().backward()  # type: ignore[no-untyped-call]
    largest = max(float(tensor.grad.abs().max()) for tensor in copies.values() if tensor.grad is not None)
    for path, tensor in directions.items():
        mine, theirs = tensor.grad, copies[path].grad
        assert mine is not None
        assert theirs is not None
        assert theirs.any(), path
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert all("forward" not in module.__dict__ for module in loaded.modules.values())


def test_at_serving_sparse_gates_have_no_noise(loaded: BaseModel, experts: list[AdapterFactors]) -> None:
    forward = ExpertForward(loaded, experts)
    batch = GateBatch.of(ROWS, 0, loaded.device)
    sharp = {path: torch.zeros(len(EXPERTS), d_in) for path, d_in in forward.inputs.items()}
    with torch.no_grad():
        # All scores are equal but for the absent ones: with noise every draw is another choice.
        noisy = [forward.losses(batch, sharp, RULES["moe-top1"], torch.Generator().manual_seed(n)) for n in (0, 1)]
        plain = [forward.losses(batch, sharp, RULES["moe-top1"]) for _ in range(2)]
    assert not noisy[0].equal(noisy[1])
    assert plain[0].equal(plain[1])


@pytest.mark.parametrize(("strategy", "averaged"), [("moe-soft", "outputs"), ("smear", "parameters")])
def test_directions_of_zero_weigh_all_alike(
    loaded: BaseModel, experts: list[AdapterFactors], strategy: str, averaged: Any
) -> None:
    forward = ExpertForward(loaded, experts)
    batch = GateBatch.of(ROWS, 0, loaded.device)
    zeros = {path: torch.zeros(len(EXPERTS), d_in) for path, d_in in forward.inputs.items()}
    fixed = forward.fixed_losses(batch, [1 / len(EXPERTS)] * len(EXPERTS), averaged)
    assert relative_error(forward.losses(batch, zeros, RULES[strategy]), fixed) < 1e-5


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    """An expert for each kind of prompt, each far from the others."""
    for seed, (name, asked) in enumerate(ASKED.items()):
        folder = tiny_adapter(
            tmp_path / name, base, seed=seed, rank=2 + seed, alpha=40, modules=("q_proj", "down_proj", "up_proj")
        )
        hub.register(folder, base_model=base, samples=[asked.format(word) for word in WORDS])
    return hub


def rows_of(pool: LoraHub, base: Path) -> list[dict[str, str]]:
    """Each prompt with the right expert's own answer."""
    asked = [(name, template.format(word)) for name, template in ASKED.items() for word in WORDS]
    routings = [Routing("selection", adapters=(name,)) for name, _ in asked]
    answers = pool.generate([text for _, text in asked], base_model=base, routing=routings, sampling=Sampling(6))
    return [
        {"inputs": text, "targets": one.text if one.text.strip() else "none"}
        for (_, text), one in zip(asked, answers, strict=True)
    ]


def given_rows() -> list[dict[str, str]]:
    return [{"inputs": asked.format(word), "targets": word} for asked in ASKED.values() for word in WORDS]


@pytest.mark.parametrize("strategy", TRAINED)
def test_training_finds_the_experts_that_answer(pool: LoraHub, base: Path, tmp_path: Path, strategy: str) -> None:
    report = pool.train_experts(
        strategy=strategy,
        base_model=base,
        output=tmp_path / "gate",
        experts=list(ASKED),
        rows=rows_of(pool, base),
        steps=40,
        batch=9,
        answer_tokens=6,
        learning_rate=0.02,
        validation=0.2,
        check_every=40,
    )
    assert report.uniform_loss is not None
    assert report.validation[-1][1] < 0.95 * report.uniform_loss
    gate = ExpertGate.load(report.file)
    assert gate.digest == report.digest
    assert (gate.strategy, list(gate.experts.items())) == (strategy, [(n, pool.get(n).digest) for n in ASKED])
    gate.check_fits(pool.engine(base).base.shapes)
    assert not (tmp_path / "gate.part").exists()


def test_a_killed_training_goes_on_to_the_same_file(
    pool: LoraHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"strategy": "moe-top1", "base_model": base, "rows": given_rows()}
    whole = SMALL.fit(pool, output=tmp_path / "whole", **given)
    dealt: list[int] = []

    def killed(*args: Any, step: int, **options: Any) -> Any:
        dealt.append(step)
        if len(dealt) == 4:
            raise KeyboardInterrupt
        return plan_rows(*args, step=step, **options)

    monkeypatch.setattr(expert_training, "plan_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        SMALL.fit(pool, output=tmp_path / "broken", **given)
    assert not (tmp_path / "broken").exists()
    resumed = SMALL.fit(pool, output=tmp_path / "broken", **given)
    assert dealt == [0, 1, 2, 3, 2, 3]  # from the checkpoint after two steps on
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (resumed.losses, resumed.validation, resumed.digest) == (whole.losses, whole.validation, whole.digest)


def test_a_finished_training_is_not_repeated_and_another_does_not_replace_it(
    pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"strategy": "smear", "base_model": base, "output": tmp_path / "gate"}
    first = SMALL.fit(pool, rows=given_rows(), **given)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given_rows()))
    again = SMALL.fit(pool, rows=file, **given)
    assert (again.digest, again.losses, again.seconds) == (first.digest, first.losses, 0.0)
    with pytest.raises(ConfigurationError, match="another training"):
        SMALL.fit(pool, rows=given_rows()[1:], **given)
    with pytest.raises(ConfigurationError, match="another training"):
        SMALL.fit(pool, rows=given_rows(), experts=["plural", "mood"], **given)


def test_arrow_needs_no_rows_and_leaves_out_what_no_gate_can_weigh(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.register(tiny_adapter(tmp_path / "dora", base, dora=True), base_model=base, samples=["a lamp"])
    twin = tiny_adapter(tmp_path / "twin", base, rank=2, alpha=40, modules=("q_proj", "down_proj", "up_proj"))
    pool.register(twin, name="twin", base_model=base, samples=["an oak"])
    report = pool.train_experts(strategy="arrow", base_model=base, output=tmp_path / "gate")
    assert report.experts == ("french", "mood", "plural")
    assert "DoRA" in report.skipped["dora"]
    assert "content of 'french'" in report.skipped["twin"]
    assert (report.rows, report.losses, report.uniform_loss) == (0, (), None)
    gate = ExpertGate.load(report.file)
    assert all(tensor.norm(dim=1).allclose(torch.ones(3)) for tensor in gate.directions.values())
    again = pool.train_experts(strategy="arrow", base_model=base, output=tmp_path / "gate")
    assert again.digest == report.digest
    with pytest.raises(ConfigurationError, match=r"'dora' cannot be one of these: .*DoRA"):
        pool.train_experts(strategy="arrow", base_model=base, output=tmp_path / "other", experts=["mood", "dora"])


@pytest.mark.parametrize("strategy", list(RULES))
def test_what_is_trained_is_what_is_served(pool: LoraHub, base: Path, strategy: str) -> None:
    model = pool.engine(base).base
    forward = ExpertForward(model, [load_factors(pool.get(name)) for name in ASKED])
    draw = torch.Generator().manual_seed(0)
    directions = {path: torch.randn(len(ASKED), d_in, generator=draw) for path, d_in in forward.inputs.items()}
    digests = {name: pool.get(name).digest for name in ASKED}
    pool.use_gate(ExpertGate(strategy, pool.get("mood").base_model, digests, directions), base_model=base)
    prompt = "Is a lamp good or bad?"
    found = pool.generate([prompt, "oak"], base_model=base, routing=Routing(strategy), sampling=Sampling(4))[0]
    ids: list[int] = model.tokenizer(prompt)["input_ids"]
    vocabulary, tokens = range(len(model.tokenizer)), list[int]()
    for _ in range(4):
        batch = GateBatch.of([([*ids, *tokens], [token]) for token in vocabulary], model.pad_id, model.device)
        batch = replace(batch, prompts=torch.full_like(batch.prompts, len(ids)))
        with torch.no_grad():
            tokens.append(int(forward.losses(batch, directions, RULES[strategy]).argmin()))
    assert found.text == model.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"strategy": "mixture"}, "no fixed experts"),
        ({"strategy": "arrow"}, "rows with strategy 'arrow': expected none"),
        ({"rows": None}, "rows with strategy 'smear'"),
        ({"rows": [{"inputs": "a"}]}, "row 1"),
        ({"experts": ["french"]}, "two or more"),
        ({"experts": ["french", "nobody"]}, "no adapter 'nobody'"),
        ({"experts": ["french", "french"]}, "named twice"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    pool: LoraHub, base: Path, tmp_path: Path, given: dict[str, Any], match: str
) -> None:
    asked = {"strategy": "smear", "rows": given_rows(), "base_model": base, "output": tmp_path / "gate", **given}
    with pytest.raises(ConfigurationError, match=match):
        SMALL.fit(pool, **asked)


def test_rows_of_a_step_are_alike_in_size_and_all_take_turns() -> None:
    sizes = [7 * n % 40 for n in range(40)]
    dealt = [plan_rows(sizes, step=step, batch=4, seed=0) for step in range(10)]
    assert sorted(row for rows in dealt for row in rows) == list(range(40))
    assert max(max(sizes[row] for row in rows) - min(sizes[row] for row in rows) for rows in dealt) < 20
    assert plan_rows(sizes, step=10, batch=4, seed=0) != dealt[0] != plan_rows(sizes, step=0, batch=4, seed=1)
    uneven = [plan_rows(sizes[:10], step=step, batch=4, seed=0) for step in range(3)]
    assert sorted(row for rows in uneven for row in rows) == list(range(10))
