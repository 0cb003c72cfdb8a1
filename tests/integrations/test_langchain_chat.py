"""ChatLoraRetriever as a LangChain citizen, on a tiny random model."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_lora_hub import ChatLoraRetriever
from pydantic import BaseModel

from lora_hub_sdk.errors import ConfigurationError, EmptyPromptError, NoAdaptersError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from tests.support import endless_base

TASKS = {
    "french": ["Translate into French: good morning", "How do you say thanks in French?"],
    "maths": ["What is 12 + 30?", "Add 4 and 9."],
    "poems": ["Write a poem about the sea", "Compose a short rhyme"],
}


def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


class Person(BaseModel):
    """A person."""

    age: int
    grown_up: bool


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a chat template, and with room for tools."""
    return tiny_base(tmp_path_factory.mktemp("chat") / "tiny", chat=True, context=4096)


@pytest.fixture
def pool(base: Path, tmp_path: Path, encoder: SentenceEncoder) -> Iterator[LoraHub]:
    with closing(LoraHub(tmp_path / "hub.db", encoder=encoder)) as hub:
        for seed, (name, samples) in enumerate(TASKS.items()):
            hub.register(tiny_adapter(tmp_path / name, base, seed=seed, rank=seed + 2), samples=samples)
        yield hub


@pytest.fixture
def chat(pool: LoraHub, base: Path) -> ChatLoraRetriever:
    return ChatLoraRetriever(hub=pool, base_model=str(base), max_new_tokens=6)


def summed(chunks: Iterator[Any]) -> AIMessageChunk:
    """A stream's pieces as one."""
    first, *rest = list(chunks)
    for chunk in rest:
        first += chunk
    assert isinstance(first, AIMessageChunk)
    return first


def names(message: AIMessage) -> list[str]:
    """The adapters that answered."""
    return [adapter["name"] for adapter in message.response_metadata["route"]["adapters"]]


def output_tokens(message: AIMessage) -> int:
    """How many an answer has."""
    assert message.usage_metadata is not None
    return message.usage_metadata["output_tokens"]


def test_a_message_tells_its_route_its_model_and_its_usage(chat: ChatLoraRetriever, base: Path) -> None:
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("What is 3 + 4?")], strategy="selection")
    assert isinstance(answer, AIMessage)
    assert names(answer) == ["maths"]
    told = answer.response_metadata
    assert told["model_name"] == str(base)
    assert told["model_provider"] == "lora_hub"
    assert told["finish_reason"] == "length"
    usage = answer.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 6
    assert usage["total_tokens"] == usage["input_tokens"] + 6
    assert answer.content_blocks == [{"type": "text", "text": answer.text}]


def test_it_runs_in_a_chain(chat: ChatLoraRetriever) -> None:
    chain = ChatPromptTemplate([("system", "Answer in French."), ("human", "{text}")]) | chat | StrOutputParser()
    assert chain.invoke({"text": "thanks"}) == chat.invoke([("system", "Answer in French."), ("human", "thanks")]).text


def test_streams_add_up_to_what_invoke_gives(chat: ChatLoraRetriever) -> None:
    whole, full = chat.invoke("Add 3 and 4"), summed(chat.stream("Add 3 and 4"))

    async def pieces() -> list[Any]:
        return [piece async for piece in chat.astream("Add 3 and 4")]

    for read in (full, summed(iter(asyncio.run(pieces())))):
        assert read.content == whole.content
        assert read.usage_metadata == whole.usage_metadata
        assert read.chunk_position == "last"
        assert read.response_metadata["route"] == whole.response_metadata["route"]
        assert read.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


def test_tokens_are_counted_as_the_model_sees_them(chat: ChatLoraRetriever) -> None:
    def look_up(name: str) -> str:
        """Find somebody's number."""
        return name

    messages = [SystemMessage("Be brief."), HumanMessage("Say hello")]
    answer = chat.invoke(messages)
    assert answer.usage_metadata is not None
    assert chat.get_num_tokens_from_messages(messages) == answer.usage_metadata["input_tokens"]
    told = chat.bind_tools([look_up]).invoke(messages).usage_metadata
    assert told is not None
    assert chat.get_num_tokens_from_messages(messages, tools=[look_up]) == told["input_tokens"]
    assert 0 < chat.get_num_tokens("Say hello") < answer.usage_metadata["input_tokens"]
    few = trim_messages(messages, max_tokens=answer.usage_metadata["input_tokens"] - 1, token_counter=chat)
    assert few == messages[1:]
    with pytest.raises(ConfigurationError, match="name one to have them counted"):
        ChatLoraRetriever(hub=chat.hub).get_num_tokens("Say hello")


def test_event_streams_tell_the_same_answer_and_keep_to_their_namespace(
    chat: ChatLoraRetriever, pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    pool.register(tiny_adapter(tmp_path / "ann", base, seed=9), samples=TASKS["french"], name="hers", namespace="ann")
    config: Any = {"configurable": {"namespace": "ann"}}
    whole = chat.invoke("How are you?", config)
    assert names(whole) == ["hers"]

    async def events() -> tuple[Any, Any]:
        ends = [event async for event in chat.astream_events("How are you?", config) if "end" in event["event"]]
        typed = await chat.astream_events("How are you?", config, version="v3")
        return ends[-1]["data"]["output"], await typed.output

    old, new = asyncio.run(events())
    typed = chat.stream_events("How are you?", config, version="v3")
    for answer in (old, new, typed.output):
        assert answer.text == whole.text
        assert names(answer) == ["hers"]
        assert answer.usage_metadata == whole.usage_metadata


# -- many at once -----------------------------------------------------------------------------------------------------


def test_a_batch_is_one_engine_batch(chat: ChatLoraRetriever, pool: LoraHub, base: Path) -> None:
    prompts: list[Any] = [f"{text} ({number})" for number in range(3) for texts in TASKS.values() for text in texts]
    engine = pool.engine(base)
    answers = [answer.text for answer in chat.batch(prompts)]
    assert engine.batches == 1
    assert [answer.text for answer in asyncio.run(chat.abatch(prompts))] == answers
    assert engine.batches == 2
    assert len(set(answers)) > 3
    assert [chat.invoke(prompt).text for prompt in prompts[:3]] == answers[:3]
    found = {place: answer.text for place, answer in chat.batch_as_completed(prompts)}
    assert [found[place] for place in range(len(prompts))] == answers
    values = [chat._convert_input(prompt) for prompt in prompts]
    assert [row[0].text for row in chat.generate_prompt(values).generations] == answers


def test_a_batch_takes_one_thread_and_the_callers_context(chat: ChatLoraRetriever) -> None:
    variable = contextvars.ContextVar("variable", default="nothing")
    variable.set("the caller's")

    class Watch(BaseCallbackHandler):
        run_inline = True

        def __init__(self) -> None:
            self.threads: set[int] = set()
            self.seen: list[str] = []

        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            self.threads.add(threading.get_ident())
            self.seen.append(variable.get())

    watch = Watch()
    prompts: list[Any] = [f"prompt {number}" for number in range(12)]
    chat.batch(prompts, {"callbacks": [watch]})
    list(chat.batch_as_completed(prompts, {"callbacks": [watch]}, return_exceptions=True))
    assert len(watch.threads) <= 2
    assert watch.seen == ["the caller's"] * 24


def test_each_input_of_a_batch_has_its_own_run(chat: ChatLoraRetriever) -> None:
    class Runs(BaseCallbackHandler):
        def __init__(self) -> None:
            self.asked: dict[Any, str] = {}
            self.answered: dict[Any, Any] = {}
            self.failed: dict[Any, BaseException] = {}

        def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **_: Any) -> None:
            self.asked[run_id] = messages[0][0].text

        def on_llm_end(self, response: Any, *, run_id: Any, **_: Any) -> None:
            self.answered[run_id] = response.generations[0][0].message

        def on_llm_error(self, error: BaseException, *, run_id: Any, **_: Any) -> None:
            self.failed[run_id] = error

    runs = Runs()
    prompts: list[Any] = ["Add 3 and 4", "", "Say thanks in French"]
    found = chat.batch(prompts, {"callbacks": [runs]}, return_exceptions=True)
    assert isinstance(found[1], EmptyPromptError)
    assert sorted(runs.asked.values()) == sorted(prompts)
    assert {runs.asked[run] for run in runs.failed} == {""}
    assert {runs.asked[run]: answer.text for run, answer in runs.answered.items()} == {
        prompts[place]: found[place].text for place in (0, 2)
    }


def test_without_return_exceptions_the_error_keeps_its_type(chat: ChatLoraRetriever) -> None:
    prompts: list[Any] = ["fine", ""]
    with pytest.raises(EmptyPromptError):
        chat.batch(prompts)
    with pytest.raises(EmptyPromptError):
        asyncio.run(chat.abatch(prompts))
    with pytest.raises(NoAdaptersError, match="nobody"):
        chat.batch(["a", "b"], {"configurable": {"namespace": "nobody"}})


def test_what_is_cached_is_not_waited_for(pool: LoraHub, base: Path) -> None:
    chat = ChatLoraRetriever(hub=pool, base_model=str(base), max_new_tokens=4, cache=InMemoryCache())
    known = chat.invoke("Add 3 and 4")
    found = chat.batch(["Add 3 and 4", "Say thanks"])
    assert found[0].text == known.text
    assert pool.engine(base).batches == 2
    assert [answer.text for answer in chat.batch(["Say thanks", "Add 3 and 4"])] == [found[1].text, known.text]
    assert pool.engine(base).batches == 2


def test_leaving_a_batch_early_frees_its_rows(tmp_path: Path, hub: LoraHub) -> None:
    wide = endless_base(tmp_path / "wide")
    hub.register(tiny_adapter(tmp_path / "french", wide), samples=TASKS["french"])
    chat = ChatLoraRetriever(hub=hub, base_model=str(wide), max_new_tokens=30_000)
    engine = hub.engine(str(wide))
    answers = chat.batch_as_completed(["Say hello", "Say thanks"], [{"configurable": {"namespace": "nobody"}}, {}])
    with pytest.raises(NoAdaptersError):
        next(answers)

    def wait_for(cancelled: int) -> None:
        until = time.monotonic() + 60
        while engine.stats().running or engine.stats().requests["cancelled"] < cancelled:
            assert time.monotonic() < until
            time.sleep(0.002)

    wait_for(0)
    before = engine.stats().requests["cancelled"]

    async def cancel() -> None:
        task = asyncio.create_task(chat.abatch(["Say hello", "Say thanks"]))
        while engine.stats().running < 2:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_for(before + 2)


# -- the caches' key --------------------------------------------------------------------------------------------------


def test_the_cache_is_never_stale(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    chat = ChatLoraRetriever(hub=pool, base_model=str(base), max_new_tokens=4, cache=InMemoryCache())
    engine = pool.engine(base)

    def asked(**given: Any) -> int:
        before = engine.batches
        chat.invoke("Add 3 and 4", **given)
        asyncio.run(chat.ainvoke("Add 3 and 4", **given))
        assert engine.batches <= before + 1, "the second time the cache knows it"
        return engine.batches - before

    schema = Person.model_json_schema()
    calls: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 5},
        {"stop": ["x"]},
        {"strategy": "fusion"},
        {"search_by": "all"},
        {"tools": [add], "tool_choice": "none"},
        {"tools": [add], "tool_choice": "any"},
        {"tools": [add], "tool_choice": "any", "parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}},
    ]
    assert [asked(**call) for call in calls] == [1] * len(calls)
    assert [asked(**call) for call in calls] == [0] * len(calls)
    pool.register(tiny_adapter(tmp_path / "sums", base, seed=9), samples=["Add 3 and 4"])
    assert asked() == 1


def test_functions_and_classes_of_one_name_are_told_apart_in_the_caches_key(pool: LoraHub, base: Path) -> None:
    chat = ChatLoraRetriever(hub=pool, base_model=str(base), max_new_tokens=4, cache=InMemoryCache())
    before = pool.engine(base).batches
    for number in range(8):
        # The last one's place in memory is free again.
        chat.invoke("Add 3 and 4", search_by=lambda messages, number=number: f"{messages[0].text} {number}")
    assert pool.engine(base).batches == before + 8
    for number in range(4):
        fields = {"__annotations__": {f"field_{number}": int}}
        chat.invoke("Add 3 and 4", response_format=type("Same", (BaseModel,), fields))
    assert pool.engine(base).batches == before + 12


# -- options ----------------------------------------------------------------------------------------------------------


def test_search_by_says_which_turn_finds_the_adapters(chat: ChatLoraRetriever) -> None:
    turns: list[Any] = [("human", "Write a poem about the sea"), ("ai", "Waves."), ("human", "What is 12 + 30?")]
    chosen: dict[str, Any] = {"strategy": "selection"}
    assert names(chat.invoke(turns, **chosen)) == ["maths"]
    assert names(chat.invoke(turns, search_by=lambda messages: messages[0].text, **chosen)) == ["poems"]
    assert [member.adapter.name for member in chat.explain(turns, **chosen).members] == ["maths"]
    route = asyncio.run(chat.aexplain(turns, search_by=lambda messages: messages[0].text, **chosen))
    assert [member.adapter.name for member in route.members] == ["poems"]


def test_fields_can_be_configured(chat: ChatLoraRetriever) -> None:
    open_to = chat.configurable_fields(
        k=ConfigurableField("k"), strategy=ConfigurableField("strategy"), search_by=ConfigurableField("search_by")
    )
    config: Any = {"configurable": {"k": 1, "strategy": "fusion", "search_by": "all"}}
    answer = open_to.invoke("Add 3 and 4", config)
    assert names(answer) == ["maths"]
    assert answer.response_metadata["route"]["strategy"] == "fusion"
    assert [message.text for message in open_to.batch(["Add 3 and 4"] * 2, config)] == [answer.text] * 2


def test_the_names_of_other_models_are_understood(pool: LoraHub, base: Path) -> None:
    standard: dict[str, Any] = {"model": str(base), "max_tokens": 3, "timeout": 60, "temperature": 0}
    chat = ChatLoraRetriever(hub=pool, **standard)
    assert (chat.base_model, chat.max_new_tokens, chat.timeout_s) == (str(base), 3, 60)
    assert output_tokens(chat.invoke("hello")) == 3
    assert output_tokens(chat.invoke("hello", max_tokens=5)) == 5
    traced = chat._get_ls_params(stop=["x"], model="another", temperature=0.5)
    assert traced == {
        "ls_provider": "lora_hub",
        "ls_model_name": "another",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 3,
        "ls_stop": ["x"],
    }
    with pytest.raises(ConfigurationError, match="max_tokens=5 and max_new_tokens=6"):
        chat.invoke("hello", max_tokens=5, max_new_tokens=6)


def test_its_profile_tells_what_it_can(chat: ChatLoraRetriever) -> None:
    profile: Any = chat.profile
    assert profile["max_input_tokens"] == 4096
    assert profile["tool_calling"]
    assert profile["structured_output"]
    assert not profile["image_inputs"]
    assert (chat.metadata or {})["lc_versions"].keys() >= {"langchain-core", "lora-hub-sdk"}


def test_what_makes_no_sense_is_refused(chat: ChatLoraRetriever) -> None:
    image: Any = [HumanMessage([{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}])]
    with pytest.raises(ConfigurationError, match="image_url"):
        chat.invoke(image)
    with pytest.raises(ConfigurationError, match="colour"):
        chat.invoke("x", colour="red")
    with pytest.raises(ConfigurationError, match="substract"):
        chat.bind_tools([add], tool_choice="substract")
    with pytest.raises(ConfigurationError, match="method"):
        chat.with_structured_output(Person, method="guessing")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="strict"):
        chat.with_structured_output(Person, method="json_mode", strict=True)
    with pytest.raises(ValueError, match="colour"):
        ChatLoraRetriever(hub=chat.hub, colour="red")  # type: ignore[call-arg]


# -- tools and structured answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["any", "required", "add", True, {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_has_to_be_made_is_made_by_its_schema(chat: ChatLoraRetriever, choice: Any) -> None:
    bound = chat.bind_tools([add], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke("What is 12 + 30?", max_new_tokens=200)
    (call,) = answer.tool_calls
    assert call["name"] == "add"
    assert {name: type(value) for name, value in call["args"].items()} == {"a": int, "b": int}
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert [block["type"] for block in answer.content_blocks] == ["tool_call"]
    streamed = summed(bound.stream("What is 12 + 30?", max_new_tokens=200))
    assert [(call["name"], call["args"]) for call in streamed.tool_calls] == [("add", call["args"])]
    assert streamed.usage_metadata == answer.usage_metadata


def test_a_call_that_is_cut_off_is_invalid_also_as_a_stream(chat: ChatLoraRetriever) -> None:
    bound = chat.bind_tools([add], tool_choice="any", parallel_tool_calls=False)
    whole = output_tokens(bound.invoke("What is 12 + 30?", max_new_tokens=200))
    # Before its name, in it, within the arguments, and after them.
    for limit in (13, 25, *range(40, whole - 12, 5), whole - 6):
        answer = bound.invoke("What is 12 + 30?", max_new_tokens=limit)
        streamed = summed(bound.stream("What is 12 + 30?", max_new_tokens=limit))
        for message in (answer, streamed):
            assert message.tool_calls == [], limit
            assert len(message.invalid_tool_calls) == 1, limit
            assert message.response_metadata["finish_reason"] == "length"
        assert answer.invalid_tool_calls[0]["error"]


def test_an_agents_history_is_understood(chat: ChatLoraRetriever) -> None:
    call: Any = {"name": "add", "args": {"a": 1, "b": 2}, "id": "1", "type": "tool_call"}
    wrong: Any = {"name": "add", "args": '{"a": 1', "id": "2", "error": "cut off", "type": "invalid_tool_call"}
    blocks: Any = [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "so"}, call]
    history = [
        HumanMessage("What is 1 + 2?"),
        AIMessage(blocks, tool_calls=[call], response_metadata={"output_version": "v1"}),
        ToolMessage("3", tool_call_id="1"),
        AIMessage("", invalid_tool_calls=[wrong]),
        ToolMessage("that was no call", tool_call_id="2", status="error"),
        HumanMessage("And 2 + 3?"),
    ]
    answer = chat.bind_tools([add]).invoke(history)
    assert isinstance(answer, AIMessage)
    assert names(answer)[0] == "maths"


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_answers_have_the_form_of_their_schema(chat: ChatLoraRetriever, method: Any) -> None:
    long = chat.model_copy(update={"max_new_tokens": 300})
    person = long.with_structured_output(Person, method=method).invoke("Tell me of Ann.")
    assert isinstance(person, Person)
    schema = Person.model_json_schema()
    as_dict = long.with_structured_output(schema, method=method)
    assert as_dict.invoke("Tell me of Ann.").keys() == {"age", "grown_up"}
    assert list(as_dict.stream("Tell me of Ann."))[-1].keys() == {"age", "grown_up"}
    raw = long.with_structured_output(Person, method=method, include_raw=True).invoke("Tell me of Ann.")
    assert isinstance(raw["raw"], AIMessage)
    assert raw["parsed"] == person
    assert raw["parsing_error"] is None


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_half_a_structured_answer_is_an_error(chat: ChatLoraRetriever, method: Any) -> None:
    short = chat.model_copy(update={"max_new_tokens": 8})
    for schema in (Person, Person.model_json_schema()):
        with pytest.raises(OutputParserException, match="cut off"):
            short.with_structured_output(schema, method=method).invoke("Tell me of Ann.")
        with pytest.raises(OutputParserException, match="cut off"):
            list(short.with_structured_output(schema, method=method).stream("Tell me of Ann."))
    raw = short.with_structured_output(Person, method=method, include_raw=True).invoke("Tell me of Ann.")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)
