from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lora_hub_sdk.engine.prompt import PromptEncoder, Template
from lora_hub_sdk.errors import ConfigurationError, PromptTooLongError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import byte_tokenizer, tiny_base


@pytest.fixture(scope="module")
def smol() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct").folder)


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def test_auto_uses_the_chat_template_and_ends_where_the_answer_begins(smol: Any) -> None:
    ids = PromptEncoder(smol).encode("Hello", limit=1000).ids
    assert ids == PromptEncoder(smol, "chat").encode("Hello", limit=1000).ids
    text = smol.decode(ids)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_auto_without_a_chat_template_is_the_text_itself(plain: Any) -> None:
    assert plain.decode(PromptEncoder(plain).encode("Hello", limit=99).ids) == "Hello"


def test_none_is_the_text_itself(smol: Any) -> None:
    assert smol.decode(PromptEncoder(smol, None).encode("Hello", limit=99).ids) == "Hello"


def test_alpaca_and_functions_wrap_the_text(plain: Any) -> None:
    alpaca = plain.decode(PromptEncoder(plain, "alpaca").encode("Sing {a} song", limit=999).ids)
    assert alpaca.endswith("### Instruction:\nSing {a} song\n\n### Response:\n")
    own = PromptEncoder(plain, lambda text: f"Q: {text} A:").encode("why", limit=99)
    assert plain.decode(own.ids) == "Q: why A:"


def test_chat_is_refused_where_there_is_no_chat_template(plain: Any) -> None:
    with pytest.raises(ConfigurationError, match="no chat template"):
        PromptEncoder(plain, "chat")
    with pytest.raises(ConfigurationError, match="llama3"):
        PromptEncoder(plain, "llama3")  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["chat", "alpaca", None])
def test_a_long_prompt_keeps_its_end_and_the_whole_template(smol: Any, template: Template) -> None:
    encoder = PromptEncoder(smol, template)
    short = smol.decode(encoder.encode("END", limit=999).ids)
    text = "front " + "filler words " * 500 + "the question is the END"
    cut = encoder.encode(text, limit=120)
    shown = smol.decode(cut.ids)
    assert len(cut.ids) <= 120
    assert cut.truncated > 800
    assert "front" not in shown
    before, _, after = short.partition("END")
    assert shown.startswith(before)
    assert shown.endswith("the question is the END" + after)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), limit=st.integers(1, 60))
@example(text="\u08000", limit=2)  # the cut falls into a character of three tokens, before one that fits
def test_the_limit_always_holds_and_what_is_kept_is_the_end(plain: Any, text: str, limit: int) -> None:
    try:
        encoded = PromptEncoder(plain, None).encode(text, limit=limit)
    except PromptTooLongError:
        assert len(text[-1].encode()) > limit  # not even its last character fits
        return
    assert 1 <= len(encoded.ids) <= limit
    kept = plain.decode(encoded.ids)
    assert text.endswith(kept)
    assert encoded.truncated == len(text.encode()) - len(kept.encode())


def test_refuse_says_how_much_there_was(smol: Any) -> None:
    with pytest.raises(PromptTooLongError) as caught:
        PromptEncoder(smol, None).encode("word " * 50, limit=10, overflow="refuse", row=3)
    assert (caught.value.row, caught.value.limit) == (3, 10)
    assert caught.value.tokens >= 50


def test_a_template_that_alone_is_too_long_is_an_error(smol: Any) -> None:
    with pytest.raises(PromptTooLongError, match="template alone"):
        PromptEncoder(smol, "chat").encode("word " * 50, limit=5)


def test_special_tokens_are_added_once_by_templates(tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base(tmp_path / "chatty", chat=True))
    assert tokenizer.decode(PromptEncoder(tokenizer).encode("hi", limit=99).ids) == "<user>hi\n<assistant>"


# -- tokenizers of many kinds ------------------------------------------------------------------------------------------

LLAMA = (
    "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [LLAMA, ZEPHYR, GEMMA, None])
def test_a_prompt_has_at_most_one_bos_and_is_what_transformers_makes_of_it(
    template: str | None, bos: bool, pad: bool
) -> None:
    tokenizer = byte_tokenizer(template=template, bos=bos, pad=pad)
    found = list(PromptEncoder(tokenizer).encode("say it", limit=999).ids)
    if template is None:
        expected = tokenizer("say it")["input_ids"]
    else:
        chat = [{"role": "user", "content": "say it"}]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert found == list(expected)
    writes = template is None or template.startswith("{{ bos_token }}")
    assert found.count(tokenizer.bos_token_id) == (1 if bos and writes else 0)


def test_a_function_that_writes_the_bos_itself_does_not_double_it() -> None:
    tokenizer = byte_tokenizer(bos=True)
    own = PromptEncoder(tokenizer, lambda text: f"<bos>[INST] {text} [/INST]").encode("x", limit=99)
    assert tokenizer.decode(own.ids) == "<bos>[INST] x [/INST]"


def test_a_tokenizer_that_ends_each_text_does_not_end_a_prompt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(PromptEncoder(tokenizer, None).encode("x", limit=9).ids) == "x"
    assert tokenizer.decode(PromptEncoder(tokenizer, None).encode("x<eos>", limit=9).ids).startswith("x<eos>")


def test_a_long_prompt_keeps_its_bos() -> None:
    tokenizer = byte_tokenizer(bos=True)
    cut = PromptEncoder(tokenizer, None).encode("front " * 50 + "END", limit=10)
    assert cut.ids[0] == tokenizer.bos_token_id
    assert len(cut.ids) == 10
    assert tokenizer.decode(cut.ids).endswith("END")


def test_a_token_that_the_model_does_not_know_is_named() -> None:
    tokenizer = byte_tokenizer(tokens=["<far>"])
    encoder = PromptEncoder(tokenizer, None, rows=len(tokenizer) - 1)
    encoder.encode("plain", limit=99)
    with pytest.raises(ConfigurationError, match=r"'<far>' \(258\), and the model knows 258"):
        encoder.encode("a <far> cry", limit=99)
