"""A gate from its training to its answers, as users meet it: the hub, the command line, LangChain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_lora_hub import LoraRetrieverLLM
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.composition.ramole import Ramole, RouterLora
from lora_hub_sdk.engine._gate_forward import FactorBank, GateBatch, GatedForward
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.prompt import PromptEncoder
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from lora_hub_sdk.types import Routing, Sampling

ASKED = {"french": "Translate {} to French", "plural": "The plural of {}", "mood": "Is {} good or bad?"}
WORDS = ("oak", "lamp", "stone", "paper")
GATED = Routing("ramole", k=3)
SMALL: dict[str, Any] = {"width": 4, "steps": 2, "batch": 4, "answer_tokens": 4}


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    for seed, (name, asked) in enumerate(ASKED.items()):
        folder = tiny_adapter(tmp_path / name, base, seed=seed, rank=2 + seed, alpha=30)
        hub.register(folder, base_model=base, samples=[asked.format(word) for word in WORDS])
    return hub


def sharp(hub: LoraHub, base: Path, seed: int = 0) -> Ramole:
    """A random gate whose weights are far from uniform."""
    draw = torch.Generator().manual_seed(seed)
    name = hub.list()[0].base_model
    shapes = hub.engine(base).base.shapes
    routers = {
        path: RouterLora(torch.randn(4, d_in, generator=draw), torch.randn(d_out, 4, generator=draw))
        for path, (d_out, d_in) in shapes.items()
    }
    return Ramole(name, routers)


def by_the_training(hub: LoraHub, base: Path, gate: Ramole, prompt: str, count: int) -> list[int]:
    """Greedy tokens by the trainer's own forward, which knows neither caches nor pools."""
    model = hub.engine(base).base
    route = hub.route([prompt], base_model=base, routing=GATED)[0]
    bank = FactorBank([load_factors(member.adapter) for member in route.members], model)
    forward = GatedForward(model, bank)
    routers = {path: (router.a, router.b) for path, router in gate.routers.items()}
    ids = list(PromptEncoder(model.tokenizer).encode(prompt, limit=200).ids)
    tokens: list[int] = []
    vocabulary = range(model.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    for _ in range(count):
        batch = GateBatch.of([([*ids, *tokens], [token]) for token in vocabulary], model.pad_id, model.device)
        with torch.no_grad():
            losses = forward.losses(batch, [(0, 1, 2)] * len(vocabulary), routers)
        tokens.append(int(losses.argmin()))
        if tokens[-1] in model.eos_ids:
            break
    return tokens


def test_the_engine_answers_as_the_training_computes(pool: LoraHub, base: Path) -> None:
    prompts = [asked.format("glass") for asked in ASKED.values()]
    gate = sharp(pool, base)
    pool.use_gate(gate, base_model=base)
    found = pool.generate(prompts, base_model=base, routing=GATED, sampling=Sampling(4))
    tokenizer = pool.engine(base).base.tokenizer
    for prompt, completion in zip(prompts, found, strict=True):
        tokens = by_the_training(pool, base, gate, prompt, 4)
        assert completion.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert completion.trace.route.averaged == "tokens"
    assert [one.text for one in found] != [
        one.text for one in pool.generate(prompts, base_model=base, sampling=Sampling(4))
    ]


def test_a_trained_gate_answers_also_in_engines_that_are_loaded_later(
    open_hub: Callable[..., LoraHub], pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    report = pool.train_gate(base_model=base, output=tmp_path / "gate", **SMALL)
    used = pool.use_gate(tmp_path / "gate")
    assert used is not None
    assert used.digest == report.digest
    assert {name: gate.digest for name, gate in pool.gates.items()} == {used.base_model: used.digest}
    engine = pool.engine(base)
    assert engine.gate is used
    later = open_hub()
    later.use_gate(tmp_path / "gate", base_model=base)
    prompt = "Translate glass to French"
    answers = [
        hub.generate([prompt], base_model=base, routing=GATED, sampling=Sampling(4))[0].text for hub in (pool, later)
    ]
    assert answers[0] == answers[1]
    pool.use_gate(None, base_model=base)
    assert engine.gate is None
    assert pool.gates == {}


def test_without_a_gate_the_error_tells_how_to_get_one(pool: LoraHub, base: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"hub\.train_gate"):
        pool.generate(["Translate glass to French"], base_model=base, routing=GATED)
    with pytest.raises(ConfigurationError, match="name the base model"):
        pool.use_gate(None)


def test_a_gate_of_another_base_model_is_refused(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    gate = sharp(pool, base)
    fewer = tiny_base(tmp_path / "fewer", layers=1)
    with pytest.raises(ConfigurationError, match="lacks it"):
        pool.use_gate(gate, base_model=fewer)
    assert pool.gates == {}


def test_the_command_line_trains_a_gate_and_answers_with_it(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.close()
    gate, common = str(tmp_path / "gate"), ["--base-model", str(base), "--database", str(tmp_path / "hub.db")]
    command = ["train-gate", gate, *common, "--steps", "2", "--batch", "2"]
    told = CliRunner().invoke(app, [*command, "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert (report["steps"], sorted(report["trained"]), report["file"]) == (2, sorted(ASKED), gate)
    again = CliRunner().invoke(app, command)
    assert "trained on 9 rows of 3 adapters, 2 steps in 0 s" in again.stdout
    assert "uniform mixture" in again.stdout
    asked = ["generate", "Translate glass to French", *common, "--strategy", "ramole", "--max-new-tokens", "2"]
    answered = CliRunner().invoke(app, [*asked, "--gate", gate, "--json"])
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout)[0]["route"]["strategy"] == "ramole"
    assert CliRunner().invoke(app, asked).exit_code == 2


def test_langchains_cache_tells_gates_apart(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        sharp(pool, base, seed).save(tmp_path / f"gate{seed}")
    prompt = "Translate glass to French"
    options: dict[str, Any] = {"strategy": "ramole", "max_new_tokens": 6}
    cache = InMemoryCache()
    texts = []
    for seed in (0, 1):
        llm = LoraRetrieverLLM(hub=pool, base_model=base, gate=tmp_path / f"gate{seed}", cache=cache, **options)
        texts.append(llm.invoke(prompt))
        assert llm.invoke(prompt) == texts[-1]
    assert texts[0] != texts[1]
    # The hub's gate counts, whoever set it.
    pool.use_gate(tmp_path / "gate0", base_model=base)
    assert LoraRetrieverLLM(hub=pool, base_model=base, cache=cache, **options).invoke(prompt) == texts[0]


def test_a_request_without_a_gate_is_refused_by_the_engine_itself(pool: LoraHub, base: Path) -> None:
    route = pool.route(["Translate glass to French"], base_model=base, routing=GATED)[0]
    with pytest.raises(ConfigurationError, match="needs a gate"):
        pool.engine(base).submit(Request("Translate glass to French", route))
