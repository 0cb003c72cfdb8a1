"""A gate from its training to its answers, as users meet it: the hub, the command line, LangChain."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_lora_hub import LoraRetrieverLLM
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate
from lora_hub_sdk.composition.ramole import Ramole, RouterLora
from lora_hub_sdk.engine._gate_forward import FactorBank, GateBatch, GatedForward
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.expert_forward import ExpertForward
from lora_hub_sdk.engine.prompt import PromptEncoder
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import ConfigurationError, NoAdaptersError
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
    assert pool.gates == {used.base_model: {"ramole": used}}
    engine = pool.engine(base)
    assert engine.gates == {"ramole": used}
    later = open_hub()
    later.use_gate(tmp_path / "gate", base_model=base)
    prompt = "Translate glass to French"
    answers = [
        hub.generate([prompt], base_model=base, routing=GATED, sampling=Sampling(4))[0].text for hub in (pool, later)
    ]
    assert answers[0] == answers[1]
    pool.use_gate(None, base_model=base)
    assert engine.gates == {}
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


def of_experts(hub: LoraHub, base: Path, strategy: str, seed: int = 0, names: Sequence[str] = ()) -> ExpertGate:
    """Random directions over the registered adapters."""
    draw = torch.Generator().manual_seed(seed)
    adapters = [hub.get(name) for name in names or sorted(ASKED)]
    directions = {
        path: torch.randn(len(adapters), d_in, generator=draw)
        for path, (_, d_in) in hub.engine(base).base.shapes.items()
    }
    experts = {adapter.name: adapter.digest for adapter in adapters}
    return ExpertGate(strategy, adapters[0].base_model, experts, directions)


def test_every_strategy_has_a_gate_of_its_own_and_its_experts_answer(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    engine, prompt = pool.engine(base), "Translate glass to French"
    gates = {strategy: of_experts(pool, base, strategy, seed) for seed, strategy in enumerate(RULES)}
    for strategy, gate in gates.items():
        gate.save(tmp_path / strategy)
        used = pool.use_gate(tmp_path / strategy)
        assert used is not None
        assert used.digest == gate.digest
    pool.use_gate(sharp(pool, base))
    name = pool.list()[0].base_model
    assert pool.gates[name].keys() == engine.gates.keys() == {*RULES, "ramole"}
    texts = {}
    for strategy in gates:
        (completion,) = pool.generate([prompt], base_model=base, routing=Routing(strategy), sampling=Sampling(6))
        route, texts[strategy] = completion.trace.route, completion.text
        assert [(one.adapter.name, one.weight) for one in route.members] == [(one, 1 / 3) for one in sorted(ASKED)]
        assert route.averaged == ("prompt" if strategy == "smear" else "tokens")
    assert len(set(texts.values())) > 3
    pool.use_gate(None, base_model=base, strategy="arrow")
    assert pool.gates[name].keys() == engine.gates.keys() == {*RULES, "ramole"} - {"arrow"}
    with pytest.raises(ConfigurationError, match=r"'arrow' needs a gate.*hub\.train_experts"):
        pool.route([prompt], base_model=base, routing=Routing("arrow"))
    pool.use_gate(None, base_model=base)
    assert pool.gates == {}
    assert engine.gates == {}


@pytest.mark.parametrize("strategy", ["moe-soft", "moe-top1", "smear", "arrow"])
def test_experts_answer_as_their_training_computes(pool: LoraHub, base: Path, strategy: str) -> None:
    gate, prompt = of_experts(pool, base, strategy), "Is glass good or bad?"
    pool.use_gate(gate)
    (found,) = pool.generate([prompt], base_model=base, routing=Routing(strategy), sampling=Sampling(4))
    model = pool.engine(base).base
    forward = ExpertForward(model, [load_factors(pool.get(name)) for name in gate.experts])
    ids, tokens = list(PromptEncoder(model.tokenizer).encode(prompt, limit=200).ids), list[int]()
    while len(tokens) < 4 and not model.eos_ids.intersection(tokens):
        answers = [(ids, [*tokens, token]) for token in range(model.vocabulary or 0)]
        batch = GateBatch.of(answers, model.pad_id, model.device)
        with torch.no_grad():
            tokens.append(int(forward.losses(batch, gate.directions, gate.rule).argmin()))
    told: Any = model.tokenizer
    assert found.text == told.decode(tokens, skip_special_tokens=True)


def test_some_of_the_experts_may_be_asked_for_and_no_others(pool: LoraHub, base: Path) -> None:
    pool.use_gate(of_experts(pool, base, "moe-soft", names=("french", "mood")))

    def members(**options: Any) -> list[str]:
        routing = Routing("moe-soft", **options)
        return [one.adapter.name for one in pool.route(["Is oak good?"], base_model=base, routing=routing)[0].members]

    assert members() == ["french", "mood"]
    assert members(exclude=("mood",)) == ["french"]
    assert members(adapters=("mood",)) == ["mood"]
    with pytest.raises(ConfigurationError, match=r"'plural' is no expert"):
        members(adapters=("mood", "plural"))
    with pytest.raises(NoAdaptersError, match="leaves out all experts"):
        members(exclude=("mood", "french"))
    with pytest.raises(ConfigurationError, match="give base_model"):
        pool.route(["Is oak good?"], routing=Routing("moe-soft"))


def test_a_gate_tells_a_namespace_nothing_of_anothers_adapters(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.use_gate(of_experts(pool, base, "moe-soft"))
    pool.register(tiny_adapter(tmp_path / "theirs", base, seed=9), samples=["Name a river."], namespace="theirs")
    for adapters in (None, ("theirs",)):
        asked = Routing("moe-soft", adapters=adapters, namespace="theirs")
        with pytest.raises(ConfigurationError) as caught:
            pool.route(["good or bad?"], base_model=base, routing=asked)
        assert not any(name in str(caught.value) for name in ("french", "mood", "plural"))


def test_an_expert_that_changed_since_is_refused_by_name(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.use_gate(of_experts(pool, base, "arrow"))
    pool.remove("mood")
    samples = [ASKED["mood"].format(word) for word in WORDS]
    pool.register(tiny_adapter(tmp_path / "other", base, seed=9), base_model=base, name="mood", samples=samples)
    with pytest.raises(ConfigurationError, match=r"'mood' is no expert.*content.*hub\.train_experts"):
        pool.generate(["Is oak good?"], base_model=base, routing=Routing("arrow"))
    answered = pool.generate(["Is oak good?"], base_model=base, routing=Routing("arrow", exclude=("mood",)))
    assert len(answered[0].trace.route.members) == 2


def test_a_file_that_is_no_gate_is_told_and_nothing_changes(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("no gate")
    with pytest.raises(ConfigurationError, match=r"this file is no gate; hub\.train_gate\(\) and hub\.train_experts"):
        pool.use_gate(tmp_path / "note")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        pool.use_gate(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="this gate is for 'arrow'"):
        pool.use_gate(of_experts(pool, base, "arrow"), strategy="smear")
    assert pool.gates == {}


def test_the_command_line_answers_with_a_gate_over_experts(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    of_experts(pool, base, "smear").save(tmp_path / "gate")
    pool.close()
    asked = ["generate", "Is oak good?", "--base-model", str(base), "--database", str(tmp_path / "hub.db")]
    answered = CliRunner().invoke(
        app, [*asked, "--strategy", "smear", "--gate", str(tmp_path / "gate"), "--max-new-tokens", "2", "--json"]
    )
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout)[0]["route"]["strategy"] == "smear"
    assert CliRunner().invoke(app, [*asked, "--strategy", "smear"]).exit_code == 2


def test_a_request_without_a_gate_is_refused_by_the_engine_itself(pool: LoraHub, base: Path) -> None:
    route = pool.route(["Translate glass to French"], base_model=base, routing=GATED)[0]
    with pytest.raises(ConfigurationError, match="needs a gate"):
        pool.engine(base).submit(Request("Translate glass to French", route))


def test_gates_over_experts_are_made_on_the_command_line(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.close()
    rows, gate = tmp_path / "rows.jsonl", str(tmp_path / "gate.safetensors")
    rows.write_text("".join(json.dumps({"inputs": f"Is {word} good?", "targets": word}) + "\n" for word in WORDS))
    common = ["--database", str(tmp_path / "hub.db"), "--base-model", str(base)]
    made = ["train-experts", gate, *common, "--strategy", "smear", "--rows", str(rows), "--steps", "2"]
    told = CliRunner().invoke(app, [*made, "--expert", "mood", "--expert", "french", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["experts"] == ["mood", "french"]
    again = CliRunner().invoke(app, [*made, "--expert", "mood", "--expert", "french"])
    assert "smear over 2 experts: mood, french" in again.stdout
    assert "trained on 3 rows, 2 steps in 0 s" in again.stdout
    arrow = CliRunner().invoke(app, ["train-experts", gate + "2", *common, "--strategy", "arrow"])
    assert "arrow over 3 experts: french, mood, plural" in arrow.stdout
