"""LoraRetrieverLLM as a LlamaIndex citizen, on tiny random models."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index_lora_hub import LoraRetrieverLLM
from pydantic import BaseModel, field_validator

from lora_hub_sdk import EngineSettings
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.errors import (
    AdapterNotFoundError,
    ConfigurationError,
    EmptyPromptError,
    UnknownStrategyError,
    UnusableAnswerError,
)
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Conversation, Message
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from lora_hub_sdk.types import Routing, Sampling
from tests.encoders import Gate, Hashing
from tests.support import endless_base

TASKS = {
    "french": ["Translate into French: good morning", "How do you say thanks in French?"],
    "maths": ["What is 12 + 30?", "Add 4 and 9."],
}
SUM = "What is 3 + 4?"
HELLO = "Say hello in French"


class Verdict(BaseModel):
    """What a review says."""

    mood: Literal["good", "bad"]
    sure: bool


class Impossible(BaseModel):
    """A class with a rule that no schema tells."""

    sure: bool

    @field_validator("sure")
    @classmethod
    def never(cls, value: bool) -> bool:
        raise ValueError(f"{value} is never right")


class Switch(BaseModel):
    state: Literal["on", "off"]


class Ring(BaseModel):
    times: Literal[1, 2]


def switch(state: str) -> str:
    """Switch the light."""
    return f"the light is {state}"


def ring(times: int) -> str:
    """Ring the bell."""
    return "ding " * times


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a chat template, and room for a tool's description by bytes."""
    return tiny_base(tmp_path_factory.mktemp("chat") / "tiny", chat=True, context=4096)


@pytest.fixture
def pool(hub: LoraHub, chat_base: Path, tmp_path: Path) -> LoraHub:
    for seed, (name, samples) in enumerate(TASKS.items()):
        hub.register(tiny_adapter(tmp_path / name, chat_base, seed=seed, rank=seed + 2), samples=samples)
    return hub


@pytest.fixture
def llm(pool: LoraHub, chat_base: Path) -> LoraRetrieverLLM:
    return LoraRetrieverLLM(hub=pool, base_model=str(chat_base), strategy="selection", max_new_tokens=6)


@pytest.fixture
def tools() -> list[FunctionTool]:
    return [
        FunctionTool.from_defaults(switch, fn_schema=Switch, return_direct=True),
        FunctionTool.from_defaults(ring, fn_schema=Ring),
    ]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_hubs_answer_and_tells_its_route(llm: LoraRetrieverLLM, pool: LoraHub) -> None:
    response = llm.complete(SUM)
    (expected,) = pool.generate(
        [SUM], base_model=llm.base_model, routing=Routing("selection"), sampling=Sampling(max_new_tokens=6)
    )
    assert response.text == expected.text
    raw: dict[str, Any] = response.raw or {}
    assert raw["route"]["adapters"][0]["name"] == "maths"
    assert raw["model"] == str(llm.base_model)
    assert raw["usage"] == response.additional_kwargs == expected.usage.as_dict()
    assert raw["finish_reason"] == expected.finish_reason
    assert raw["timing"]["total_s"] > 0
    assert asyncio.run(llm.acomplete(SUM)).text == response.text


def test_options_may_be_given_with_each_call(llm: LoraRetrieverLLM) -> None:
    def names(**given: Any) -> list[str]:
        return [member["name"] for member in (llm.complete(SUM, **given).raw or {})["route"]["adapters"]]

    assert names() == ["maths"]
    assert names(strategy="mixture", k=2) == ["maths", "french"]
    assert names(adapters=("french",)) == ["french"]
    assert names(strategy="base") == []
    assert len(llm.chat([ChatMessage(SUM)], max_new_tokens=20).message.content or "") > 6


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"strategy": "soup"}, UnknownStrategyError),
        ({"k": 0}, ConfigurationError),
        ({"strategi": "mixture"}, ValueError),
        ({"messages_to_prompt": lambda messages: str(messages)}, ConfigurationError),
    ],
)
def test_fields_that_make_no_sense_are_refused_at_once(
    pool: LoraHub, chat_base: Path, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        LoraRetrieverLLM(hub=pool, base_model=str(chat_base), **fields)


def test_calls_that_make_no_sense_are_refused(llm: LoraRetrieverLLM) -> None:
    with pytest.raises(ConfigurationError, match="colour"):
        llm.complete(SUM, colour="red")
    with pytest.raises(ConfigurationError, match="colour"):
        llm.stream_chat([ChatMessage(SUM)], colour="red")
    with pytest.raises(EmptyPromptError):
        llm.chat([ChatMessage(" ")])
    with pytest.raises(AdapterNotFoundError):
        asyncio.run(llm.acomplete(SUM, adapters=("nobody",)))


def test_a_formatted_prompt_goes_in_as_it_is(llm: LoraRetrieverLLM) -> None:
    as_it_is = llm.complete(SUM, template=None)
    assert llm.complete(SUM, formatted=True).raw["usage"] == as_it_is.raw["usage"]
    assert as_it_is.raw["usage"] != llm.complete(SUM).raw["usage"]


def test_a_completion_to_prompt_takes_the_templates_place_and_not_the_searchs(
    pool: LoraHub, chat_base: Path, llm: LoraRetrieverLLM
) -> None:
    def french(prompt: str) -> str:
        return f"{TASKS['french'][0]} {prompt}"

    own = LoraRetrieverLLM(
        hub=pool, base_model=str(chat_base), strategy="selection", max_new_tokens=6, completion_to_prompt=french
    )
    found, expected = own.complete(SUM), llm.complete(french(SUM), formatted=True, adapters=("maths",))
    assert (found.text, found.raw["usage"]) == (expected.text, expected.raw["usage"])
    assert found.raw["route"]["adapters"][0]["name"] == "maths"


def test_streams_grow_to_the_whole_answer_and_end_with_its_facts(llm: LoraRetrieverLLM) -> None:
    def check(responses: list[Any], texts: list[str], whole: str) -> None:
        assert len(responses) > 3
        assert texts == ["".join(response.delta for response in responses[: n + 1]) for n in range(len(responses))]
        assert texts[-1] == whole
        assert [response.raw is None for response in responses] == [True] * (len(responses) - 1) + [False]
        assert responses[-1].raw["route"]["adapters"][0]["name"] == "maths"

    async def gathered() -> tuple[list[Any], list[Any]]:
        complete, chat = await llm.astream_complete(SUM), await llm.astream_chat([ChatMessage(SUM)])
        return [response async for response in complete], [response async for response in chat]

    completed, chatted = asyncio.run(gathered())
    for found in (list(llm.stream_complete(SUM)), completed):
        check(found, [response.text for response in found], llm.complete(SUM).text)
    for found in (list(llm.stream_chat([ChatMessage(SUM)])), chatted):
        check(found, [response.message.content for response in found], str(llm.complete(SUM)))


# -- conversations ----------------------------------------------------------------------------------------------------


def test_a_chat_is_the_hubs_answer_to_the_conversation(llm: LoraRetrieverLLM, pool: LoraHub) -> None:
    messages = [
        ChatMessage("You translate.", role="system"),
        ChatMessage(HELLO),
        ChatMessage("bonjour", role="assistant"),
        ChatMessage(SUM),
    ]
    conversation = Conversation.of([
        Message("system", "You translate."),
        Message("user", HELLO),
        Message("assistant", "bonjour"),
        Message("user", SUM),
    ])  # fmt: skip
    (expected,) = pool.generate(
        [conversation], base_model=llm.base_model, routing=Routing("selection"), sampling=Sampling(max_new_tokens=6)
    )
    response = llm.chat(messages)
    assert response.message.role is MessageRole.ASSISTANT
    assert response.message.content == expected.text
    assert (response.raw or {})["usage"] == expected.usage.as_dict()
    assert asyncio.run(llm.achat(messages)).message == response.message


def test_which_text_of_a_conversation_finds_its_adapters_is_an_option(llm: LoraRetrieverLLM) -> None:
    messages = [ChatMessage(SUM), ChatMessage("7", role="assistant"), ChatMessage(HELLO)]

    def first(**given: Any) -> str:
        return str((llm.chat(messages, **given).raw or {})["route"]["adapters"][0]["name"])

    assert first() == "french"
    assert first(search_by=lambda rows: rows[0].text) == "maths"
    with pytest.raises(ConfigurationError, match="search_by"):
        first(search_by="nothing")


def test_predict_and_its_kin_go_through_the_chat(llm: LoraRetrieverLLM) -> None:
    template = PromptTemplate("What is {a} + {b}?")
    expected = llm.chat([ChatMessage(SUM)]).message.content
    assert llm.predict(template, a=3, b=4) == expected
    assert asyncio.run(llm.apredict(template, a=3, b=4)) == expected
    assert "".join(llm.stream(template, a=3, b=4)) == expected
    wordy = llm.model_copy(update={"system_prompt": "You add."})
    assert wordy.predict(template, a=3, b=4) == str(
        llm.chat([ChatMessage("You add.", role="system"), ChatMessage(SUM)]).message.content
    )


def test_query_engines_and_chat_engines_run_on_it(llm: LoraRetrieverLLM) -> None:
    index = SummaryIndex.from_documents([Document(text="Ada lives in Rome."), Document(text="3 + 4 is 7.")])
    answer = str(index.as_query_engine(llm=llm).query(SUM))
    assert answer
    assert str(index.as_query_engine(llm=llm, streaming=True).query(SUM)) == answer
    assert str(asyncio.run(index.as_query_engine(llm=llm, use_async=True).aquery(SUM))) == answer
    engine, own = SimpleChatEngine.from_defaults(llm=llm), ChatMessage(HELLO)
    first = engine.chat(HELLO).response
    second = "".join(engine.stream_chat(SUM).response_gen)
    assert first == llm.chat([own]).message.content
    assert second == llm.chat([own, ChatMessage(first, role="assistant"), ChatMessage(SUM)]).message.content


def test_what_is_no_text_is_refused_by_its_place(llm: LoraRetrieverLLM) -> None:
    picture = ImageBlock(url="http://127.0.0.1/cat.png")
    with pytest.raises(ConfigurationError, match=r"messages\[1\].*image"):
        llm.chat([ChatMessage("What is this?"), ChatMessage(content=[TextBlock(text="A cat?"), picture])])
    with pytest.raises(ConfigurationError, match="function"):
        llm.chat([ChatMessage("x", role="function")])


def test_blocks_around_a_text_change_nothing(llm: LoraRetrieverLLM) -> None:
    plain = [ChatMessage(HELLO), ChatMessage("bonjour", role="model"), ChatMessage(f"Rome\n{SUM}\nseven")]
    wrapped = [
        ChatMessage(content=[TextBlock(text=HELLO), CachePoint(cache_control={"type": "ephemeral"})]),  # type: ignore[arg-type]
        ChatMessage(role="assistant", content=[ThinkingBlock(content="Hm."), TextBlock(text="bonjour")]),
        ChatMessage(
            content=[
                CitableBlock(title="Rome", source="a book", content=[TextBlock(text=SUM)]),
                CitationBlock(
                    cited_content=TextBlock(text="seven"),
                    source="a book",
                    title="Rome",
                    additional_location_info={},
                ),
            ]
        ),
    ]
    found, expected = llm.chat(wrapped), llm.chat(plain)
    assert found.message == expected.message
    assert (found.raw or {})["usage"] == (expected.raw or {})["usage"]


# -- tools ------------------------------------------------------------------------------------------------------------


def test_a_required_call_fits_its_tool_however_it_is_asked_for(
    llm: LoraRetrieverLLM, tools: list[FunctionTool]
) -> None:
    def asked(response: ChatResponse) -> tuple[str, dict[str, Any]]:
        (call,) = llm.get_tool_calls_from_response(response)
        assert response.message.blocks[-1].tool_call_id == call.tool_id  # type: ignore[union-attr]
        assert (response.raw or {})["finish_reason"] == "tool_calls"
        return call.tool_name, call.tool_kwargs

    async def gathered() -> tuple[ChatResponse, list[ChatResponse]]:
        responses = await llm.astream_chat_with_tools(tools, SUM, **given)
        return await llm.achat_with_tools(tools, SUM, **given), [response async for response in responses]

    given: dict[str, Any] = {"tool_required": True, "max_new_tokens": 100}
    found = asked(llm.chat_with_tools(tools, SUM, **given))
    assert found in [
        ("switch", {"state": "on"}),
        ("switch", {"state": "off"}),
        ("ring", {"times": 1}),
        ("ring", {"times": 2}),
    ]
    alone, streamed = asyncio.run(gathered())
    assert asked(alone) == asked(streamed[-1]) == found
    assert asked(list(llm.stream_chat_with_tools(tools, SUM, **given))[-1]) == found

    ids = {call.tool_id for one in streamed for call in llm.get_tool_calls_from_response(one, False)}
    assert len(ids) == 1, "a call keeps its id while it is written"
    blocks = [block for one in streamed for block in one.message.blocks if isinstance(block, ToolCallBlock)]
    assert all(str(later.tool_kwargs).startswith(str(one.tool_kwargs)) for one, later in itertools.pairwise(blocks))
    assert len({str(block.tool_kwargs) for block in blocks}) > 3


def test_a_named_tool_is_called_and_none_is_called_where_none_may_be(
    llm: LoraRetrieverLLM, tools: list[FunctionTool]
) -> None:
    for choice in ("ring", {"type": "function", "function": {"name": "ring"}}):
        response = llm.chat_with_tools(tools, SUM, tool_choice=choice, max_new_tokens=100)
        assert [call.tool_name for call in llm.get_tool_calls_from_response(response)] == ["ring"]
    response = llm.chat_with_tools(tools, SUM, tool_choice="none")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(UnusableAnswerError, match="tool_required=True"):
        llm.get_tool_calls_from_response(response)
    with pytest.raises(ConfigurationError, match="fly"):
        llm.chat_with_tools(tools, SUM, tool_choice="fly")


def test_a_call_that_was_cut_off_is_told(llm: LoraRetrieverLLM, tools: list[FunctionTool]) -> None:
    response = llm.chat_with_tools(tools, SUM, tool_required=True, max_new_tokens=20)
    (invalid,) = response.message.additional_kwargs["invalid_tool_calls"]
    assert invalid["error"]
    with pytest.raises(UnusableAnswerError, match="cannot be made"):
        llm.get_tool_calls_from_response(response)


def test_a_call_and_its_result_go_back_into_the_conversation(llm: LoraRetrieverLLM, tools: list[FunctionTool]) -> None:
    first = llm.chat_with_tools(tools, SUM, tool_choice="ring", max_new_tokens=100)
    (call,) = llm.get_tool_calls_from_response(first)
    answer = {"role": "tool", "additional_kwargs": {"tool_call_id": call.tool_id}}
    history = [ChatMessage(SUM), first.message, ChatMessage("ding", **answer)]
    second = llm.chat_with_tools(tools, chat_history=history, tool_choice="none")
    # Messages that were stored, or that an older part of LlamaIndex wrote, have calls beside the blocks only.
    bare = ChatMessage(role="assistant", blocks=[], additional_kwargs=first.message.additional_kwargs)
    stored = [ChatMessage.model_validate(one.model_dump()) for one in (history[0], bare, history[2])]
    for again in (history, stored):
        third = llm.chat_with_tools(tools, chat_history=again, tool_choice="none")
        assert (third.raw or {})["usage"] == (second.raw or {})["usage"]
        assert third.message.content == second.message.content
    with pytest.raises(ConfigurationError, match="tool_call_id"):
        llm.chat([ChatMessage(SUM), first.message, ChatMessage("ding", role="tool")])


def test_predict_and_call_calls_the_tool(llm: LoraRetrieverLLM, tools: list[FunctionTool]) -> None:
    given: dict[str, Any] = {"tool_required": True, "tool_choice": "ring", "max_new_tokens": 100}
    assert llm.predict_and_call(tools, SUM, **given).response.startswith("ding")
    assert asyncio.run(llm.apredict_and_call(tools, SUM, **given)).response.startswith("ding")


@pytest.mark.parametrize("streaming", [True, False])
def test_an_agent_runs_to_its_end(llm: LoraRetrieverLLM, tools: list[FunctionTool], streaming: bool) -> None:
    # The first call is forced, and its result is the agent's: a random model would call on for ever.
    patient = llm.model_copy(update={"max_new_tokens": 100})
    agent = FunctionAgent(
        tools=[*tools],
        llm=patient,
        initial_tool_choice="switch",
        allow_parallel_tool_calls=False,
        streaming=streaming,
        system_prompt="You look after the light.",
    )

    async def ask() -> Any:
        return await agent.run("Light, please")

    output = asyncio.run(ask())
    (call,) = output.tool_calls
    assert call.tool_name == "switch"
    assert output.response.content == switch(**call.tool_kwargs)


# -- structured -------------------------------------------------------------------------------------------------------


def test_structured_prediction_is_held_to_the_schema_in_every_way(llm: LoraRetrieverLLM) -> None:
    template, given = PromptTemplate("Is it good? {review}"), {"max_new_tokens": 100}
    expected = llm.structured_predict(Verdict, template, llm_kwargs=given, review="Never again.")
    assert isinstance(expected, Verdict)

    async def gathered() -> tuple[Any, list[Any]]:
        objects = await llm.astream_structured_predict(Verdict, template, llm_kwargs=given, review="Never again.")
        return (
            await llm.astructured_predict(Verdict, template, llm_kwargs=given, review="Never again."),
            [found async for found in objects],
        )

    alone, streamed = asyncio.run(gathered())
    also = list(llm.stream_structured_predict(Verdict, template, llm_kwargs=given, review="Never again."))
    assert alone == streamed[-1] == also[-1] == expected
    assert len(streamed) > 3
    structured = llm.as_structured_llm(Verdict)
    assert structured.chat([ChatMessage("Is it good? Never again.")], **given).raw == expected
    by_call = llm.model_copy(update={"pydantic_program_mode": PydanticProgramMode.FUNCTION})
    assert isinstance(
        by_call.structured_predict(Verdict, template, llm_kwargs={"max_new_tokens": 400}, review="Never again."),
        Verdict,
    )


def test_an_object_that_cannot_be_made_is_an_error_that_says_why(llm: LoraRetrieverLLM) -> None:
    template = PromptTemplate("Is it good?")
    with pytest.raises(UnusableAnswerError, match="raise max_new_tokens"):
        llm.structured_predict(Verdict, template, llm_kwargs={"max_new_tokens": 3})
    with pytest.raises(UnusableAnswerError, match="raise max_new_tokens"):
        list(llm.stream_structured_predict(Verdict, template, llm_kwargs={"max_new_tokens": 3}))
    with pytest.raises(UnusableAnswerError, match="never right"):
        llm.structured_predict(Impossible, template, llm_kwargs={"max_new_tokens": 60})


# -- what LlamaIndex is told ------------------------------------------------------------------------------------------


def test_the_metadata_tells_the_context_without_loading_the_model(pool: LoraHub, chat_base: Path) -> None:
    llm = LoraRetrieverLLM(hub=pool, base_model=str(chat_base), max_new_tokens=7)
    metadata = llm.metadata
    assert (metadata.context_window, metadata.num_output) == (4096, 7)
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert metadata.model_name == str(chat_base)
    assert pool.loaded_bases() == ()
    assert LoraRetrieverLLM(hub=pool).metadata.context_window == 4096
    assert LoraRetrieverLLM(hub=pool, bases=(str(chat_base),)).metadata.context_window == 4096


def test_a_model_as_a_dictionary_holds_no_hub(llm: LoraRetrieverLLM) -> None:
    written = llm.to_dict()
    assert written["class_name"] == "LoraRetrieverLLM"
    assert "hub" not in written
    assert llm.to_payload()["strategy"] == "selection"


def test_the_token_counter_counts_what_the_engine_counted(llm: LoraRetrieverLLM) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    llm.callback_manager = CallbackManager([counter])
    usages = [(llm.complete(SUM).raw or {})["usage"], (llm.chat([ChatMessage(SUM)]).raw or {})["usage"]]
    usages.append(list(llm.stream_chat([ChatMessage(SUM)]))[-1].raw["usage"])
    assert counter.prompt_llm_token_count == sum(usage["prompt_tokens"] for usage in usages)
    assert counter.completion_llm_token_count == sum(usage["completion_tokens"] for usage in usages)


# -- many at once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(chat_base: Path, tmp_path: Path) -> Iterator[tuple[LoraHub, Gate]]:
    """A hub whose engine waits for 64 rows, and whose encoder waits for a gate."""
    gate = Gate()
    doors: list[Callable[[object], None]] = []
    engines = EngineSettings(EngineLimits(max_rows=64, gather_s=60.0, prefill_tokens=1 << 16))
    encoder = Hashing("one", lambda texts: [door(texts) for door in doors])
    with closing(LoraHub(tmp_path / "crowd.db", encoder=encoder, engines=engines)) as hub:
        for seed, (name, samples) in enumerate(TASKS.items()):
            hub.register(tiny_adapter(tmp_path / name, chat_base, seed=seed), samples=samples)
        doors.append(gate)
        yield hub, gate
        gate.open()


def test_64_tasks_are_one_batch_and_the_loop_turns_all_the_while(
    crowded: tuple[LoraHub, Gate], chat_base: Path
) -> None:
    hub, gate = crowded
    llm = LoraRetrieverLLM(hub=hub, base_model=str(chat_base), max_new_tokens=6)

    async def last(responses: Any) -> Any:
        return [response async for response in await responses][-1]

    async def ask() -> list[Any]:
        prompts = [f"prompt {number:02}" for number in range(16)]
        answers = asyncio.gather(
            *(llm.acomplete(prompt) for prompt in prompts),
            *(llm.achat([ChatMessage(prompt)]) for prompt in prompts),
            *(last(llm.astream_complete(prompt)) for prompt in prompts),
            *(last(llm.astream_chat([ChatMessage(prompt)])) for prompt in prompts),
        )
        # The loop opens the gate. Were it held up by a call that waits there, it would never come to that.
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        gate.open()
        return await answers

    found = [str(answer).removeprefix("assistant: ") for answer in asyncio.run(ask())]
    assert hub.engine(str(chat_base)).batches == 1
    assert found[:16] == found[16:32] == found[32:48] == found[48:]
    assert len(set(found)) > 3


@pytest.fixture
def endless(hub: LoraHub, tmp_path: Path) -> LoraRetrieverLLM:
    """A model whose answers would take minutes."""
    wide = endless_base(tmp_path / "wide")
    hub.register(tiny_adapter(tmp_path / "french", wide), samples=TASKS["french"])
    return LoraRetrieverLLM(hub=hub, base_model=str(wide), max_new_tokens=30_000)


def test_leaving_a_stream_or_cancelling_a_task_frees_the_row(endless: LoraRetrieverLLM, hub: LoraHub) -> None:
    engine = hub.engine(str(endless.base_model))

    async def cancelled(count: int) -> None:
        until = time.monotonic() + 60
        while engine.stats().requests["cancelled"] < count:
            assert time.monotonic() < until
            await asyncio.sleep(0.002)

    pieces = endless.stream_chat([ChatMessage(HELLO)])
    assert next(pieces).delta
    pieces.close()
    asyncio.run(cancelled(1))

    async def leave() -> None:
        asked: list[Any] = [endless.astream_complete(HELLO), endless.astream_chat([ChatMessage(HELLO)])]
        for responses in [await one for one in asked]:
            assert (await anext(responses)).delta
            await responses.aclose()
        await cancelled(3)
        task = asyncio.create_task(endless.achat([ChatMessage(HELLO)]))
        while engine.stats().running < 1:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await cancelled(4)

    asyncio.run(leave())
