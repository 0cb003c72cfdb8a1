"""An agent of LangChain's, on the embedded model and real adapters, from a question to a structured answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage, ToolMessage
from langchain_lora_hub import ChatLoraRetriever, adapter_tool, hub_tools
from pydantic import BaseModel, Field

from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.types import DEFAULT_NAMESPACE

SMOLLM2: Final = "smollm2-135m-instruct"
QUESTION: Final = {"messages": [HumanMessage("Which adapter translates into Italian?")]}


class Found(BaseModel):
    """The adapter that fits."""

    adapter: str = Field(min_length=1, max_length=40)
    score: float


def example(question: str, name: str) -> Iterator[AnyMessage]:
    """One run that went as it should, for a model too small to plan by itself."""
    told = {"adapters": [{"name": name, "score": 0.9}]}
    yield HumanMessage(question)
    yield AIMessage("", tool_calls=[{"name": "search_adapters", "args": {"query": question}, "id": "call_1"}])
    yield ToolMessage(json.dumps(told), tool_call_id="call_1")
    yield AIMessage(Found(adapter=name, score=0.9).model_dump_json())


class LookFirst(AgentMiddleware[Any, Any, Any]):
    """Shows examples, and has the model search before it answers: left alone, 135M parameters call tools for ever."""

    shown: Final = (*example("Which adapter fixes grammar?", "grammar"), *example("Who can rhyme?", "poems"))

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return handler(self._led(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        return await handler(self._led(request))

    def _led(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        searched = any(isinstance(message, ToolMessage) for message in request.messages)
        request = request.override(messages=[*self.shown, *request.messages])
        if searched:
            return request.override(tools=[])
        once = {"parallel_tool_calls": False}
        return request.override(tool_choice="search_adapters", response_format=None, model_settings=once)


@pytest.fixture(scope="module")
def hub(encoder: SentenceEncoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoraHub]:
    database = tmp_path_factory.mktemp("agent") / "hub.db"
    with LoraHub(database, encoder=encoder, index="exact", offline=True) as hub:
        for adapter in demo_adapters():
            if adapter.name in ("date-iso", "sentiment", "translate-it"):
                hub.register(adapter.folder, samples=adapter.samples)
            if adapter.name == "language-id":
                hub.register(adapter.folder, samples=adapter.samples, namespace="tenant")
        yield hub


def agent(hub: LoraHub, response_format: Any) -> Any:
    # Whatever the model writes, the bounds of the schemas let every call and answer be completed in so many tokens.
    chat = ChatLoraRetriever(hub=hub, base_model=SMOLLM2, strategy="base", max_new_tokens=1200)
    return create_agent(chat, hub_tools(hub), response_format=response_format, middleware=[LookFirst()])


def check(messages: Sequence[AnyMessage], answer: object, hub: LoraHub, namespace: str = DEFAULT_NAMESPACE) -> None:
    question, call, told, last = messages[:4]
    assert isinstance(question, HumanMessage)
    assert isinstance(call, AIMessage)
    (asked,) = call.tool_calls
    assert (asked["name"], call.response_metadata["finish_reason"]) == ("search_adapters", "tool_calls")
    assert isinstance(told, ToolMessage)
    assert (told.name, told.status) == ("search_adapters", "success")
    hits = hub.search(asked["args"]["query"], asked["args"].get("k", 3), namespace=namespace)
    assert hits
    assert [hit["name"] for hit in json.loads(str(told.content))["adapters"]] == [hit.adapter.name for hit in hits]
    assert isinstance(last, AIMessage)
    assert isinstance(answer, Found)


def test_an_agent_searches_and_answers_in_form(hub: LoraHub) -> None:
    state = agent(hub, ProviderStrategy(Found)).invoke(QUESTION)
    check(state["messages"], state["structured_response"], hub)
    assert Found.model_validate_json(state["messages"][-1].text) == state["structured_response"]


def test_an_agent_on_an_event_loop_sees_its_caller_s_namespace(hub: LoraHub) -> None:
    config = {"configurable": {"namespace": "tenant"}}
    state = asyncio.run(agent(hub, ProviderStrategy(Found)).ainvoke(QUESTION, config))
    check(state["messages"], state["structured_response"], hub, "tenant")


def test_an_agent_streams_its_calls_and_its_answer(hub: LoraHub) -> None:
    updates: dict[str, list[Any]] = {"messages": list(QUESTION["messages"]), "structured_response": []}
    pieces: list[AIMessageChunk] = []
    for mode, piece in agent(hub, ToolStrategy(Found)).stream(QUESTION, stream_mode=["updates", "messages"]):
        if mode == "messages":
            pieces += [piece[0]] if isinstance(piece[0], AIMessageChunk) else []
            continue
        for update in piece.values():
            updates["messages"] += update["messages"]
            updates["structured_response"] += filter(None, [update.get("structured_response")])
    (answer,) = updates["structured_response"]
    check(updates["messages"], answer, hub)
    # Each of the two calls came in parts that give the whole together.
    last = updates["messages"][3]
    (whole,) = last.tool_calls
    parts = [piece for piece in pieces if piece.id == last.id]
    assert len(parts) > 3
    assert json.loads("".join(str(c["args"] or "") for part in parts for c in part.tool_call_chunks)) == whole["args"]
    assert Found.model_validate(whole["args"]) == answer


@pytest.mark.slow
def test_an_agent_streams_on_an_event_loop(hub: LoraHub) -> None:
    async def last() -> dict[str, Any]:
        states = [state async for state in agent(hub, ProviderStrategy(Found)).astream(QUESTION, stream_mode="values")]
        assert len(states) > 3
        final: dict[str, Any] = states[-1]
        return final

    state = asyncio.run(last())
    check(state["messages"], state["structured_response"], hub)


def test_an_agent_has_an_expert_answer(hub: LoraHub) -> None:
    expert = adapter_tool(hub, "date-iso", base_model=SMOLLM2, max_new_tokens=16)
    call = {"name": expert.name, "args": {"prompt": "Write this date in ISO 8601 form: 3 mars 2021"}, "id": "1"}
    message = expert.invoke({**call, "type": "tool_call"})
    assert message.content == "2021-03-03"
    assert [member["name"] for member in message.artifact["route"]["adapters"]] == ["date-iso"]
