"""Adapters as documents, and a hub's tools for agents, on a tiny random model."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_lora_hub import AdapterRetriever, LoraRetrieverLLM, adapter_tool, hub_tools
from langchain_tests.integration_tests import RetrieversIntegrationTests, ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests

from lora_hub_sdk.errors import AdapterNotFoundError, ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Conversation, Message, Tool
from lora_hub_sdk.testing import LocalHub, tiny_adapter
from lora_hub_sdk.types import DEFAULT_NAMESPACE
from tests.encoders import Hashing

TASKS = {
    "french": ["Translate into French: good morning", "How do you say thanks in French?"],
    "maths": ["What is 12 + 30?", "Add 4 and 9."],
    "poems": ["Write a poem about the sea", "Compose a short rhyme"],
    "user/my sql": ["Select all rows of the table", "Count the users in SQL"],
}


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    fill(hub, base, tmp_path)
    return hub


@pytest.fixture(scope="module")
def standing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoraHub]:
    """A pool that nobody changes."""
    folder = tmp_path_factory.mktemp("standing")
    with LoraHub(folder / "hub.db", encoder=Hashing("one")) as hub:
        fill(hub, base, folder)
        yield hub


def fill(hub: LoraHub, base: Path, folder: Path, namespace: str = DEFAULT_NAMESPACE) -> None:
    for seed, (name, samples) in enumerate(TASKS.items()):
        source = tiny_adapter(folder / namespace / f"a{seed}", base, seed=seed, rank=seed + 2)
        hub.register(source, name=name, samples=samples, namespace=namespace)


def called(tool: BaseTool, **arguments: Any) -> ToolMessage:
    """What an agent gets for a call of a model."""
    call = {"name": tool.name, "args": arguments, "id": "call_1", "type": "tool_call"}
    message = tool.invoke(call)
    assert isinstance(message, ToolMessage)
    later = asyncio.run(tool.ainvoke(call))
    assert (later.content, later.status) == (message.content, message.status)
    return message


# -- the retriever ------------------------------------------------------------------------------------------------


def test_the_nearest_adapters_are_documents_with_their_facts(pool: LoraHub) -> None:
    retriever = AdapterRetriever(hub=pool, k=2)
    first, second = retriever.invoke("Say hello in French")
    assert first.page_content.startswith("french\nFor prompts like: Translate into French: good morning | ")
    assert (first.metadata["name"], first.metadata["trust"]) == ("french", "high")
    assert first.metadata["score"] > second.metadata["score"]
    assert first.id == f"french@{pool.get('french').revision}"
    assert asyncio.run(retriever.ainvoke("Say hello in French")) == [first, second]
    assert retriever.batch(["Say hello in French", "5 + 6"])[0] == [first, second]


def test_a_floor_leaves_out_what_is_too_far(pool: LoraHub) -> None:
    found = AdapterRetriever(hub=pool, k=4).invoke("Say hello in French")
    floor = (found[0].metadata["score"] + found[1].metadata["score"]) / 2
    assert AdapterRetriever(hub=pool, k=4, min_score=floor).invoke("Say hello in French") == found[:1]
    assert AdapterRetriever(hub=pool, min_score=1.0).invoke("Say hello in French") == []
    assert AdapterRetriever(hub=pool, k=1, exclude=("french",)).invoke("Say hello in French") == found[1:2]


def test_a_call_s_configuration_names_its_namespace_through_a_chain(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.register(tiny_adapter(tmp_path / "own", base, seed=9), samples=["secret"], namespace="tenant")
    retriever = AdapterRetriever(hub=pool)
    chain: Any = RunnablePassthrough() | retriever
    # Without being handed on by hand, as LangChain does for everything else.
    through: Any = RunnableLambda(lambda text: retriever.invoke(text))
    config: Any = {"configurable": {"namespace": "tenant"}}
    for runnable in (retriever, chain, through):
        assert names(runnable.invoke("5 + 6", config)) == ["own"]
        assert names(asyncio.run(runnable.ainvoke("5 + 6", config))) == ["own"]
        assert "own" not in names(runnable.invoke("5 + 6"))
    assert names(retriever.invoke("5 + 6", namespace="tenant")) == ["own"]


def test_searches_that_make_no_sense_are_refused(pool: LoraHub) -> None:
    with pytest.raises(ConfigurationError, match="k=0"):
        AdapterRetriever(hub=pool, k=0)
    with pytest.raises(ConfigurationError, match="strategy: cannot be given for one call"):
        AdapterRetriever(hub=pool).invoke("5 + 6", strategy="fusion")


def names(found: list[Document]) -> list[str]:
    return [document.metadata["name"] for document in found]


# -- tools over the hub -------------------------------------------------------------------------------------------


def test_an_agent_finds_an_adapter_and_reads_what_it_is(pool: LoraHub) -> None:
    search, describe = hub_tools(pool)
    found = json.loads(str(called(search, query="Say hello in French", k=2).content))["adapters"]
    assert (found[0]["name"], len(found)) == ("french", 2)
    assert "good morning" in found[0]["description"]
    told = json.loads(str(called(describe, name="french").content))
    assert told["examples"] == TASKS["french"]
    assert (told["rank"], told["repo_id"]) == (2, None)


def test_registering_is_for_those_who_ask_for_it(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> None:
    with LocalHub() as server:
        server.publish("user/sums", tiny_adapter(tmp_path / "sums", base))
        hub = open_hub(encoder=Hashing("one"), endpoint=server.url)
        assert [tool.name for tool in hub_tools(hub)] == ["search_adapters", "describe_adapter"]
        register = hub_tools(hub, namespace="mine", register=True)[-1]
        assert (
            json.loads(str(called(register, repo_id="user/sums", samples=["1 + 2"]).content))["repo_id"] == "user/sums"
        )
        refused = called(register, repo_id=str(tmp_path / "sums"))
    assert refused.status == "error"
    assert "expected a repository of the Hub" in str(refused.content)
    assert [(adapter.name, adapter.namespace) for adapter in hub.list()] == [("user/sums", "mine")]


def test_what_the_hub_refuses_is_an_error_that_the_agent_can_read(pool: LoraHub) -> None:
    search, describe = hub_tools(pool)
    for message, says in (
        (called(describe, name="frensh"), "did you mean 'french'"),
        (called(search, query=" "), "empty"),
        (called(search, query="x", k=0), "k: Input should be greater than or equal to 1"),
        (called(search, query="x", namespace="tenant"), "namespace: Extra inputs are not permitted"),
        (called(search), "query: Field required"),
    ):
        assert message.status == "error"
        assert says in str(message.content)


def test_a_tool_sees_one_namespace_alone(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    fill(pool, base, tmp_path, "tenant")
    pool.register(tiny_adapter(tmp_path / "hidden", base, seed=9), samples=["secret"], namespace="tenant")
    search, describe = hub_tools(pool)
    assert "hidden" not in str(called(search, query="secret", k=20).content)
    there, nowhere = (str(called(describe, name=name).content) for name in ("hidden", "nobody"))
    assert there.replace("hidden", "nobody") == nowhere
    assert "hidden" in str(called(hub_tools(pool, namespace="tenant")[0], query="secret", k=20).content)
    config: Any = {"configurable": {"namespace": "tenant"}}
    assert "hidden" in str(search.invoke({"query": "secret", "k": 20}, config))
    assert describe.invoke({"name": "hidden"}, config)["name"] == "hidden"


# -- an adapter as a tool -----------------------------------------------------------------------------------------


def test_an_expert_answers_as_the_model_does_with_its_adapter(pool: LoraHub, base: Path) -> None:
    llm = LoraRetrieverLLM(hub=pool, base_model=base, adapters=("maths",), max_new_tokens=6)
    ask = adapter_tool(pool, "maths", base_model=base, max_new_tokens=6)
    message = called(ask, prompt="Add 3 and 4")
    assert message.content == llm.invoke("Add 3 and 4").strip()
    assert message.content != llm.invoke("Add 3 and 4", adapters=("french",)).strip()
    assert [member["name"] for member in message.artifact["route"]["adapters"]] == ["maths"]
    # The base that it was registered for needs no name.
    assert called(adapter_tool(pool, "maths", max_new_tokens=6), prompt="Add 3 and 4").content == message.content


def test_any_adapter_s_name_becomes_one_that_models_can_call(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.register(tiny_adapter(tmp_path / "long", base, seed=9), name="é" + "x" * 200, samples=["a"])
    tools = [adapter_tool(pool, adapter.name) for adapter in pool.list()]
    assert [tool.name for tool in tools[:4]] == ["ask_french", "ask_maths", "ask_poems", "ask_user_my_sql"]
    asked = [Tool(tool.name) for tool in tools]
    assert Conversation.of([Message("user", "hello")], tools=asked).tools == tuple(asked)
    for tool in tools:
        assert convert_to_openai_tool(tool)["function"]["description"] == tool.description
    assert "Add 4 and 9." in tools[1].description
    assert adapter_tool(pool, "maths", description="adds").description == "adds"


def test_an_expert_that_cannot_answer_tells_why_without_a_path(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    ask = adapter_tool(pool, "maths", base_model=base, max_new_tokens=2)
    pool.retire("maths")
    assert "was taken out of service" in str(called(ask, prompt="Add 3 and 4").content)
    pool.restore("maths")
    shutil.rmtree(pool.get("maths").folder)
    gone = called(ask, prompt="Add 3 and 4")
    assert gone.status == "error"
    assert tmp_path.name not in str(gone.content)
    config: Any = {"configurable": {"namespace": "tenant"}}
    assert "no adapter 'maths' is registered in namespace 'tenant'" in ask.invoke({"prompt": "Add"}, config)


def test_an_expert_that_there_cannot_be_is_refused_at_once(pool: LoraHub) -> None:
    with pytest.raises(AdapterNotFoundError):
        adapter_tool(pool, "nobody")
    with pytest.raises(AdapterNotFoundError):
        adapter_tool(pool, "maths", namespace="tenant")
    with pytest.raises(ConfigurationError, match="leave adapters"):
        adapter_tool(pool, "maths", adapters=("french",))
    with pytest.raises(ConfigurationError, match="k=0"):
        adapter_tool(pool, "maths", k=0)


# -- LangChain's own suites ---------------------------------------------------------------------------------------


class _OverPool:
    """Suites have no fixtures of ours where they name what they test, so one puts the pool here."""

    hub: LoraHub

    @pytest.fixture(autouse=True)
    def _with_pool(self, standing: LoraHub) -> Iterator[None]:
        type(self).hub = standing
        yield
        del type(self).hub


class TestAdapterRetriever(_OverPool, RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return AdapterRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"hub": self.hub}

    @property
    def retriever_query_example(self) -> str:
        return "Say hello in French"


class _SearchTool(_OverPool):
    @property
    def tool_constructor(self) -> BaseTool:
        return hub_tools(self.hub)[0]

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"query": "Say hello in French"}


class TestSearchToolUnit(_SearchTool, ToolsUnitTests):
    pass


class TestSearchTool(_SearchTool, ToolsIntegrationTests):
    pass


class _DescribeTool(_OverPool):
    @property
    def tool_constructor(self) -> BaseTool:
        return hub_tools(self.hub)[1]

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"name": "french"}


class TestDescribeToolUnit(_DescribeTool, ToolsUnitTests):
    pass


class TestDescribeTool(_DescribeTool, ToolsIntegrationTests):
    pass


class _AdapterTool(_OverPool):
    @property
    def tool_constructor(self) -> BaseTool:
        return adapter_tool(self.hub, "french", max_new_tokens=3)

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"prompt": "Say hello in French"}


class TestAdapterToolUnit(_AdapterTool, ToolsUnitTests):
    pass


class TestAdapterTool(_AdapterTool, ToolsIntegrationTests):
    pass
