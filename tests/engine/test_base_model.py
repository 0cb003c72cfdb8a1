"""Loading: tokenizers that do not fit their model, and marks that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_hub_sdk.engine.base_model import load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import byte_tokenizer, tiny_family
from lora_hub_sdk.types import Completion, Sampling
from tests.support import route_of

PROMPTS = ("a", "some longer prompt", "b c d e")


def answers(folder: Path) -> list[Completion]:
    engine = Engine(load_base_model(resolve_model(folder)))
    requests = [Request(prompt, route_of("base"), Sampling(12), template=None) for prompt in PROMPTS]
    found = engine.generate(requests)
    assert engine.stats().splits == 0
    engine.close()
    return found


def expected(folder: Path) -> list[list[int]]:
    """Tokens of the answers by transformers' own generate."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        found.append(whole[0, ids.shape[1] :].tolist())
    return found


def test_several_marks_end_a_text_and_each_does(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "llama", "llama")
    ends = [tokens[3] for tokens in expected(folder)[:2]]
    for file in ("config.json", "generation_config.json"):
        raw = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(raw | {"eos_token_id": ends}))
    base = load_base_model(resolve_model(folder))
    assert base.eos_ids == {*ends, base.tokenizer.eos_token_id}
    found = answers(folder)
    assert [done.finish_reason for done in found[:2]] == ["stop", "stop"]
    assert [done.usage.completion_tokens for done in found] == [len(tokens) for tokens in expected(folder)]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_answers_are_the_same_with_any_padding(bos: bool, pad: bool, tmp_path: Path) -> None:
    """Prompts of unlike length are read side by side, so some of them are padded."""
    tokenizer = byte_tokenizer(bos=bos, pad=pad)
    folder = tiny_family(tmp_path / "llama", "llama", tokenizer=tokenizer)
    engine = Engine(load_base_model(resolve_model(folder)))
    requests = [Request(prompt, route_of("base"), Sampling(8), template=None) for prompt in PROMPTS]
    together = [done.text for done in engine.generate(requests)]
    assert together == [engine.generate([request])[0].text for request in requests]
    assert engine.stats().splits == 0
    engine.close()


def test_a_padding_token_beyond_the_embedding_is_not_used(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(pad=False)
    folder = tiny_family(tmp_path / "llama", "llama", tokenizer=tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    base = load_base_model(resolve_model(folder))
    assert base.tokenizer.pad_token_id == base.vocabulary == 258
    assert base.pad_id < 258
    assert len({done.text for done in answers(folder)}) > 1


def test_a_token_beyond_the_embedding_is_an_error_of_its_prompt_alone(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "llama", "llama")
    byte_tokenizer(tokens=["<far>"]).save_pretrained(folder)
    engine = Engine(load_base_model(resolve_model(folder)))
    with pytest.raises(ConfigurationError, match=r"<far>.*another model's tokenizer"):
        engine.generate([Request("a <far> cry", route_of("base"), Sampling(2))])
    assert engine.generate([Request("a cry", route_of("base"), Sampling(2))])[0].text
    engine.close()


def test_tokens_that_only_the_model_knows_are_answered_as_nothing(tmp_path: Path) -> None:
    """Embeddings are often rounded up; a random model says such tokens often."""
    folder = tiny_family(tmp_path / "llama", "llama", vocabulary=1500)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = expected(folder)
    assert max(map(max, tokens)) >= len(tokenizer)
    assert [done.text for done in answers(folder)] == [
        tokenizer.decode(one, skip_special_tokens=True) for one in tokens
    ]
