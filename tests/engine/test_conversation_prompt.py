"""Conversations become what their chat template makes of them, and lose whole turns where they are too long."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_hub_sdk.chat.transcript import transcript
from lora_hub_sdk.engine.conversation_prompt import shortened
from lora_hub_sdk.engine.prompt import PromptEncoder, Template
from lora_hub_sdk.errors import ConfigurationError, PromptTooLongError
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import byte_tokenizer

SYSTEM = Message("system", "Be brief.")
USER = Message("user", "How warm is it in Rome, and in Oslo?")
CALLS = (ToolCall("weather", '{"city": "Rome"}', "call_1"), ToolCall("weather", '{"city": "Oslo"}', "call_2"))
ASKS = Message("assistant", "I look.", tool_calls=CALLS)
RESULTS = (Message("tool", "31 C", tool_call_id="call_1"), Message("tool", "9 C", tool_call_id="call_2"))
WEATHER = Tool("weather", "The weather of a city", '{"type": "object", "properties": {"city": {"type": "string"}}}')
AGENT = Conversation.of([SYSTEM, USER, ASKS, *RESULTS], tools=[WEATHER])

TEMPLATES: tuple[Template, ...] = ("auto", "alpaca", None, lambda text: f"Q: {text} A:")
_TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
#: Templates as strict as those of well-known families.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + _TURNS
SILENT_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + _TURNS
)
WITH_TOOLS = (
    "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_call_id }}"
    "{% for call in m.tool_calls %}<{{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}{% endfor %}"
)
ONE_CALL = (
    "{% for m in messages if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endfor %}" + WITH_TOOLS
)
BYTES = (byte_tokenizer(template=_TURNS), byte_tokenizer())


@pytest.fixture(scope="module")
def smol() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct", offline=True).folder)


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def shown(template: str, conversation: Conversation) -> str:
    """What a model with this chat template is given."""
    tokenizer = byte_tokenizer(template=template)
    return str(tokenizer.decode(PromptEncoder(tokenizer).encode(conversation, limit=10_000).ids))


def test_a_conversation_is_rendered_by_the_chat_template(smol: Any) -> None:
    rows = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who are you?"},
    ]
    expected = smol.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    conversation = Conversation.of([Message(row["role"], row["content"]) for row in rows])  # type: ignore[arg-type]
    assert list(PromptEncoder(smol).encode(conversation, limit=999).ids) == expected
    assert list(PromptEncoder(smol, "chat").encode(conversation, limit=999).ids) == expected


def test_one_message_of_the_user_is_the_same_prompt_as_its_text(smol: Any, plain: Any) -> None:
    conversation = Conversation.of([Message("user", "Hello there")])
    for tokenizer in (smol, plain):
        for template in TEMPLATES:
            encoder = PromptEncoder(tokenizer, template)
            assert encoder.encode(conversation, limit=999) == encoder.encode("Hello there", limit=999)


def test_without_a_chat_template_the_transcript_is_the_text(plain: Any) -> None:
    assert plain.decode(PromptEncoder(plain).encode(AGENT, limit=9999).ids) == transcript(AGENT)
    own = PromptEncoder(plain, lambda text: f"<<{text}>>").encode(AGENT, limit=9999)
    assert plain.decode(own.ids) == f"<<{transcript(AGENT)}>>"


def test_templates_without_tools_are_told_of_them_in_the_system_message(smol: Any) -> None:
    text = smol.decode(PromptEncoder(smol).encode(AGENT, limit=9999).ids)
    system, user, assistant, results, answer = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n")
    assert '"weather"' in system
    assert user == f"user\n{USER.text}<|im_end|>\n"
    assert assistant.startswith("assistant\nI look.\n<tool_call>")
    assert assistant.count("<tool_call>") == 2
    assert results.startswith("user\n")
    assert results.index("31 C") < results.index("9 C")
    assert answer == "assistant\n"


def test_tools_that_must_not_be_called_are_not_shown(smol: Any) -> None:
    silent = replace(AGENT, tool_choice="none", messages=(USER,))
    assert PromptEncoder(smol).encode(silent, limit=9999).ids == PromptEncoder(smol).encode(USER.text, limit=9999).ids
    assert shown(WITH_TOOLS, silent).startswith("null")


def test_templates_with_tools_are_given_them_and_the_calls(smol: Any) -> None:
    text = shown(WITH_TOOLS, AGENT)
    tools, _, rest = text.partition("[system]")
    assert json.loads(tools) == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather of a city",
                "parameters": json.loads(WEATHER.parameters),
            },
        }
    ]
    first, second = (part.split(" ")[0] for part in rest.split("<")[1:])
    assert len(first) == len(second) == 9, "longer ids are refused by Mistral's templates"
    assert first.isalnum()
    assert first != second
    assert rest == (
        f"Be brief.[user]{USER.text}[assistant]I look."
        f'<{first} weather {{"city": "Rome"}}><{second} weather {{"city": "Oslo"}}>[tool]31 C{first}[tool]9 C{second}'
    )


def test_a_template_of_one_call_at_a_time_has_each_with_its_result() -> None:
    text = shown(ONE_CALL, AGENT)
    assert text.count("[assistant]") == 2
    assert text.index('"Rome"') < text.index("31 C") < text.index('"Oslo"') < text.index("9 C")
    assert "[system]Be brief.[user]How" in text
    assert text.count("I look.") == 1


def test_a_template_that_takes_arguments_as_text_has_them_as_they_were_written() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}"
        "{{ '<' + call.function.arguments + '>' }}{% endfor %}{% endfor %}{% if tools %}.{% endif %}"
    )
    assert '<{"city": "Rome"}><{"city": "Oslo"}>' in shown(template, AGENT)


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT_SYSTEM, ALTERNATING])
def test_templates_that_refuse_a_system_role_have_its_text_before_the_first_question(template: str) -> None:
    assert shown(template, Conversation.of([SYSTEM, USER])) == f"[user]Be brief.\n\n{USER.text}"
    unasked = Conversation.of([SYSTEM, Message("assistant", "Yes?")])
    assert shown(template, unasked) == "[user]Be brief.[assistant]Yes?"


def test_neighbours_become_one_where_turns_have_to_alternate() -> None:
    hello = Message("assistant", "Hello")
    text = shown(ALTERNATING, Conversation.of([USER, Message("user", "Tell me!"), hello, hello, USER]))
    assert text == f"[user]{USER.text}\n\nTell me![assistant]Hello\n\nHello[user]{USER.text}"


def test_an_error_of_the_template_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"chat template fails.*not today"):
        shown("{{ raise_exception('not today') }}", AGENT)


def test_an_adapters_own_template_renders_conversations_too(smol: Any) -> None:
    encoder = PromptEncoder(smol, "adapter", own=NO_SYSTEM)
    assert smol.decode(encoder.encode(Conversation.of([SYSTEM, USER]), limit=999).ids) == (
        f"[user]Be brief.\n\n{USER.text}"
    )


def test_the_oldest_turns_go_first_and_as_wholes(smol: Any) -> None:
    turns = [[Message("user", f"question {n}"), Message("assistant", f"answer {n} " * 20)] for n in range(9)]
    conversation = Conversation.of([SYSTEM, *(message for turn in turns for message in turn), USER])
    encoder, whole = PromptEncoder(smol), PromptEncoder(smol).encode(conversation, limit=9999)
    cut = encoder.encode(conversation, limit=150)
    kept = Conversation.of([SYSTEM, *turns[-1], USER])
    assert len(encoder.encode(Conversation.of([SYSTEM, *turns[-2], *turns[-1], USER]), limit=9999).ids) > 150
    assert cut.ids == encoder.encode(kept, limit=9999).ids
    assert cut.truncated == len(whole.ids) - len(cut.ids)
    with pytest.raises(PromptTooLongError, match="overflow"):
        encoder.encode(conversation, limit=150, overflow="refuse")


def test_of_a_long_last_message_the_end_is_kept_and_all_around_it(smol: Any) -> None:
    question = Message("user", "filler words " * 500 + "what is the END?")
    text = smol.decode(PromptEncoder(smol).encode(Conversation.of([SYSTEM, USER, ASKS, question]), limit=60).ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("what is the END?<|im_end|>\n<|im_start|>assistant\n")
    assert "Rome" not in text


def test_of_a_long_result_the_end_is_kept_and_the_question_before_it(smol: Any) -> None:
    long = replace(RESULTS[0], text="page " * 900 + "31 C")
    old = replace(RESULTS[0], text="outdated")
    agent = replace(AGENT, messages=(SYSTEM, USER, ASKS, old, ASKS, long))
    text = smol.decode(PromptEncoder(smol).encode(agent, limit=400).ids)
    assert USER.text in text
    assert "outdated" not in text
    assert text.count("<tool_call>\n{") == 2 + smol.decode(
        PromptEncoder(smol).encode(replace(AGENT, messages=(SYSTEM, USER)), limit=9999).ids
    ).count("<tool_call>\n{")
    assert "31 C" in text[-120:]


def test_what_cannot_be_cut_is_refused(smol: Any) -> None:
    with pytest.raises(PromptTooLongError, match="system, tools and calls"):
        PromptEncoder(smol).encode(AGENT, limit=60)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Message, ...]:
    """Turns in any order, each call with its results."""
    messages = []
    for place, kind in enumerate(draw(st.lists(st.sampled_from("suat"), min_size=1, max_size=12))):
        text = f"{kind} {place} " + "x" * draw(st.integers(0, 30))
        if kind == "t":
            calls = tuple(ToolCall("weather", "{}", f"{place}-{n}") for n in range(draw(st.integers(1, 3))))
            messages.append(Message("assistant", text, tool_calls=calls))
            messages += [Message("tool", f"of {call.id}", tool_call_id=call.id) for call in calls]
        else:
            messages.append(Message({"s": "system", "u": "user", "a": "assistant"}[kind], text))  # type: ignore[arg-type]
    return tuple(messages)


@settings(max_examples=200, deadline=None)
@given(messages=histories())
def test_shorter_versions_keep_the_system_the_last_question_and_calls_with_results(
    messages: tuple[Message, ...],
) -> None:
    versions = shortened(messages)
    assert versions[0] == messages
    users = [message for message in messages if message.role == "user"]
    for longer, version in pairwise(versions):
        assert {*map(id, version)} < {*map(id, longer)}
        assert [one for one in messages if any(one is other for other in version)] == list(version)
        assert [one for one in version if one.role == "system"] == [one for one in messages if one.role == "system"]
        assert version[-1] is messages[-1] or messages[-1].role == "system"
        spoken = [one for one in version if one.role != "system"]
        assert not users or (spoken[0].role == "user" and any(one is users[-1] for one in spoken))
        asked = {call.id for one in version for call in one.tool_calls}
        assert asked == {one.tool_call_id for one in version if one.role == "tool"}


@settings(max_examples=60, deadline=None)
@given(messages=histories(), limit=st.integers(1, 400))
def test_the_limit_always_holds_for_conversations(messages: tuple[Message, ...], limit: int) -> None:
    for tokenizer in BYTES:
        try:
            encoded = PromptEncoder(tokenizer).encode(Conversation.of(messages), limit=limit)
        except PromptTooLongError:
            continue
        assert len(encoded.ids) <= limit
        whole = PromptEncoder(tokenizer).encode(Conversation.of(messages), limit=100_000)
        assert encoded.truncated == len(whole.ids) - len(encoded.ids)
