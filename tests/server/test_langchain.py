"""langchain-openai against the server, unchanged."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

from tests.server.serving import Served


class Flag(BaseModel):
    """Whether the lamp is on."""

    on: bool


@pytest.fixture(scope="module")
def chat(served: Served) -> ChatOpenAI:
    return ChatOpenAI(
        model="auto", base_url=f"{served.url}/v1", api_key=SecretStr("none"), max_retries=0, max_completion_tokens=300
    )


def test_a_chat_model_answers_streams_and_batches_alike(chat: ChatOpenAI) -> None:
    short = chat.bind(max_tokens=8)
    answer = short.invoke("What is 12 + 30?")
    assert answer.content
    assert answer.usage_metadata
    whole: AIMessageChunk | None = None
    for chunk in short.stream("What is 12 + 30?"):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.content == answer.content
    assert [one.content for one in short.batch(["What is 12 + 30?"] * 3)] == [answer.content] * 3
    assert asyncio.run(short.ainvoke("What is 12 + 30?")).content == answer.content


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_is_what_was_asked_for(chat: ChatOpenAI, method: str) -> None:
    found = chat.with_structured_output(Flag, method=method).invoke("Is the lamp on?")  # type: ignore[arg-type]
    assert isinstance(found, Flag)


def test_bound_tools_are_called(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Flag], tool_choice="Flag", parallel_tool_calls=False)
    (call,) = bound.invoke("Switch the lamp on").tool_calls
    assert (call["name"], set(call["args"])) == ("Flag", {"on"})
    streamed: AIMessageChunk | None = None
    for chunk in bound.stream("Switch the lamp on"):
        assert isinstance(chunk, AIMessageChunk)
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [(call["name"], call["args"])]


def test_a_plain_model_answers_and_streams_alike(served: Served) -> None:
    llm = OpenAI(
        model="maths",
        base_url=f"{served.url}/v1",
        api_key=SecretStr("none"),
        max_retries=0,
        max_tokens=8,
        temperature=0,
    )
    answer = llm.invoke("What is 12 + 30?")
    assert answer
    assert "".join(llm.stream("What is 12 + 30?")) == answer
    assert llm.batch(["What is 12 + 30?", "Add 4 and 9."])[0] == answer
