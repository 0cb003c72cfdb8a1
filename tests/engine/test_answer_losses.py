"""Losses of answers under fixed weights, against a plain model whose weights carry the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_hub_sdk.engine.answer_losses import AnswerLosses
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from lora_hub_sdk.types import Averaged, Member, Route
from tests.support import Patched, dense_deltas

#: Ranks 2 to 6, rsLoRA, modules and a layer missing.
ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"rank": 3, "alpha": 12.0, "modules": (*ATTENTION, *MLP)},
    "scaled": {"rank": 6, "alpha": 8.0, "modules": ATTENTION, "rslora": True},
    "late": {"rank": 2, "alpha": 8.0, "modules": (*MLP, "q_proj"), "layers": (1,)},
    "head": {"rank": 4, "alpha": 8.0, "modules": ("v_proj", "lm_head")},
}
ROWS = [("Translate oak to French", "ch\u00eane"), ("The plural of ox", "oxen"), ("Hi", "a longer answer than that")]


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    for seed, (name, one) in enumerate(ADAPTERS.items()):
        folder = tiny_adapter(tmp_path / name, base, seed=seed, **one)
        hub.register(folder, name=name, base_model=base, samples=[f"{name} of an oak"])
    return hub


def by_a_dense_model(pool: LoraHub, base: Path, weights: list[float], averaged: Averaged) -> list[float]:
    """Cross entropy of each answer and its end, one row at a time, never any padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = pool.engine(base).base.tokenizer
    members = tuple(Member(pool.get(name), weight) for name, weight in zip(ADAPTERS, weights, strict=True))
    losses = []
    with torch.no_grad(), Patched(model, dense_deltas(Route("x", averaged, members), model)):
        for inputs, targets in ROWS:
            prompt = tokenizer(inputs)["input_ids"]
            answer = [*tokenizer(targets)["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))))
    return losses


@pytest.mark.parametrize("averaged", ["outputs", "parameters"])
def test_losses_are_the_cross_entropy_of_a_model_that_carries_the_adapters(
    pool: LoraHub, base: Path, averaged: Averaged
) -> None:
    measured = AnswerLosses(pool, ROWS, list(ADAPTERS), base_model=base, batch=2)
    for weights in ([0.25, 0.25, 0.25, 0.25], [1.3, -0.7, 0.0, 0.4], [0, 1, 0, 0], [0.0] * 4):
        expected = by_a_dense_model(pool, base, [float(weight) for weight in weights], averaged)
        assert measured.of(weights, averaged) == pytest.approx(expected, rel=1e-4)
        assert AnswerLosses(pool, ROWS, list(ADAPTERS), base_model=base).of(weights, averaged) == pytest.approx(
            expected, rel=1e-4
        )


def test_long_prompts_and_answers_are_cut(pool: LoraHub, base: Path) -> None:
    def losses(inputs: str, targets: str) -> list[float]:
        names, limits = ["wide"], {"max_tokens": 8, "answer_tokens": 3}
        return AnswerLosses(pool, [(inputs, targets)], names, base_model=base, **limits).of([1.0])  # type: ignore[arg-type]

    assert losses("the end of a prompt", "answer") == pytest.approx(losses("a prompt", "answered"))
    assert losses("a prompt", "answer") != pytest.approx(losses("another!", "answer"))


def test_an_engine_that_answers_meanwhile_changes_nothing(pool: LoraHub, base: Path) -> None:
    measured = AnswerLosses(pool, ROWS, list(ADAPTERS), base_model=base)
    alone = measured.of([0.5, 0.5, 0.0, 0.0])
    rest = pool.stream("Translate an oak", base_model=base)
    next(rest)
    assert measured.of([0.5, 0.5, 0.0, 0.0]) == pytest.approx(alone, rel=1e-5)
    assert list(rest)


def test_what_cannot_be_measured_is_refused(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="0 rows and 1 adapters"):
        AnswerLosses(pool, [], ["wide"], base_model=base)
    with pytest.raises(ConfigurationError, match="no adapter 'nobody'"):
        AnswerLosses(pool, ROWS, ["wide", "nobody"], base_model=base)
    pool.register(tiny_adapter(tmp_path / "dora", base, dora=True), name="dora", base_model=base, samples=["an oak"])
    with pytest.raises(ConfigurationError, match=r"'dora' cannot be one of these: .*DoRA"):
        AnswerLosses(pool, ROWS, ["wide", "dora"], base_model=base)
    measured = AnswerLosses(pool, ROWS, ["wide", "late"], base_model=base)
    with pytest.raises(ConfigurationError, match="1 weights for 2 adapters"):
        measured.of([1.0])
    with pytest.raises(ConfigurationError, match="averaged='tokens'"):
        measured.of([1.0, 0.0], "tokens")


def test_factors_that_the_base_completes_are_not_averaged_apart(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "pissa", base, init="pissa")
    pool.register(folder, name="pissa", base_model=base, samples=["an ox"])
    measured = AnswerLosses(pool, ROWS, ["wide", "pissa"], base_model=base)
    assert measured.of([0.0, 1.0], "parameters") == pytest.approx(measured.of([0.0, 1.0]), rel=1e-5)
    with pytest.raises(ConfigurationError, match="'pissa' cannot be averaged with others"):
        measured.of([0.5, 0.5], "parameters")
