"""``/v1/chat/completions`` as OpenAI's own client asks for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import openai
import pytest

from lora_hub_sdk.chat.openai_form import messages_of
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Conversation
from lora_hub_sdk.types import Sampling
from tests.server.serving import Served

#: So small that a random model has to say something of it.
FLAG: Final = {
    "type": "object",
    "properties": {"on": {"enum": [True, False]}},
    "required": ["on"],
    "additionalProperties": False,
}
TOOLS: Final[Any] = [
    {"type": "function", "function": {"name": name, "description": f"{name} the lamp", "parameters": FLAG}}
    for name in ("switch", "dim")
]
TALK: Final[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Write a poem about the sea"},
    {"role": "assistant", "content": "Waves."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 30?"}]},
]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_a_conversation_is_answered_as_the_hub_answers_it(
    client: openai.OpenAI, filled: LoraHub, chat_base: Path
) -> None:
    found = client.chat.completions.create(model="auto", messages=TALK, max_completion_tokens=12)
    talk = Conversation.of(messages_of(TALK))
    (expected,) = filled.generate([talk], base_model=chat_base, sampling=Sampling(12))
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert found.usage is not None
    assert found.usage.to_dict() == expected.usage.as_dict()


def test_the_last_turn_finds_the_adapters_unless_another_text_is_asked_for(client: openai.OpenAI) -> None:
    def nearest(**extra: Any) -> str:
        found = client.chat.completions.create(
            model="auto:selection", messages=TALK, max_tokens=1, extra_body=extra
        ).to_dict()
        return str(found["route"]["adapters"][0]["name"])  # type: ignore[index]

    first = [{"role": "user", "content": TALK[1]["content"]}]
    by_first = client.chat.completions.create(model="auto:selection", messages=first, max_tokens=1)  # type: ignore[arg-type]
    assert nearest() == nearest(search_by="last_user") == "maths"
    assert by_first.to_dict()["route"]["adapters"][0]["name"] == "poems"  # type: ignore[index]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    options: Any = {"model": "auto", "messages": TALK, "max_tokens": 16}
    whole = client.chat.completions.create(**options)
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == (
        whole.choices[0].message.content
    )
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-2].choices[0].to_dict()["route"] == whole.to_dict()["route"]
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    asked: Any = {"type": "json_schema", "json_schema": {"name": "flag", "schema": FLAG, "strict": True}}
    found = client.chat.completions.create(model="auto", messages=TALK, max_tokens=200, response_format=asked)
    assert json.loads(found.choices[0].message.content or "")["on"] in (True, False)
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "dim"}}])
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    found = client.chat.completions.create(
        model="auto",
        messages=TALK,
        max_tokens=400,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
    )
    calls: Any = found.choices[0].message.tool_calls
    (call,) = calls
    assert found.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name in (("switch", "dim") if choice == "required" else ("dim",))
    assert json.loads(call.function.arguments)["on"] in (True, False)
    answered: Any = [
        *TALK,
        found.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    again = client.chat.completions.create(model="auto", messages=answered, max_tokens=4, tools=TOOLS)
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_call_is_streamed_piece_by_piece(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="auto", messages=TALK, max_tokens=400, tools=TOOLS, tool_choice="required", stream=True
    )
    calls: dict[int, dict[str, str]] = {}
    finish = None
    for part in stream:
        finish = part.choices[0].finish_reason or finish
        for piece in part.choices[0].delta.tool_calls or ():
            call = calls.setdefault(piece.index, {"arguments": ""})
            assert piece.function is not None
            call["arguments"] += piece.function.arguments or ""
            if piece.function.name:
                call.update(name=piece.function.name, id=piece.id or "")
    assert finish == "tool_calls"
    assert calls
    for call in calls.values():
        assert call["name"] in ("switch", "dim")
        assert call["id"].startswith("call_")
        assert json.loads(call["arguments"])["on"] in (True, False)


def test_what_cannot_be_read_is_named_by_its_place(client: openai.OpenAI) -> None:
    picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].*image_url"):
        client.chat.completions.create(model="auto", messages=picture)


def test_the_asynchronous_client_streams_too(served: Served, client: openai.OpenAI) -> None:
    async def streamed() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
            stream = await one.chat.completions.create(model="maths", messages=TALK, max_tokens=8, stream=True)
            return "".join([part.choices[0].delta.content or "" async for part in stream])

    whole = client.chat.completions.create(model="maths", messages=TALK, max_tokens=8)
    assert asyncio.run(streamed()) == whole.choices[0].message.content
