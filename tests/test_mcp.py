"""The MCP server, asked by the real client: in memory, and as a process of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from langchain_mcp_adapters.tools import load_mcp_tools
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.shared.memory import create_connected_server_and_client_session
from mcp.types import CallToolResult, TextContent

from lora_hub_sdk import __version__
from lora_hub_sdk.faces.answer_fields import AnswerFields
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.mcp_server import create_mcp_server
from lora_hub_sdk.testing import LocalHub, tiny_adapter
from lora_hub_sdk.types import Routing, Sampling
from tests.encoders import Hashing
from tests.support import endless_base

_T = TypeVar("_T")
#: Serves a registry that writes to standard output in three ways whenever it is asked for an adapter.
NOISY = """
import os, subprocess, sys
from lora_hub_sdk.faces.answer_fields import AnswerFields
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.mcp_server import create_mcp_server, serve_stdio

class Loud(LoraHub):
    def get(self, name, **options):
        print("printed", flush=True)
        os.write(1, b"written\\n")
        subprocess.run(["echo", "by a child"], check=True)
        return super().get(name, **options)

with Loud(sys.argv[1], index="exact") as hub:
    serve_stdio(create_mcp_server(AnswerFields(hub=hub)))
print("after the end")
"""


@pytest.fixture
def pool(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> LoraHub:
    hub = open_hub(encoder=Hashing("one"), index="exact")
    for seed, name in enumerate(("french", "maths", "poems")):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed, rank=seed + 2), samples=[f"{name} please"])
    return hub


@pytest.fixture
def answers(pool: LoraHub, base: Path) -> AnswerFields:
    return AnswerFields(hub=pool, base_model=base, max_new_tokens=4, k=2)


def talk(answers: AnswerFields, ask: Callable[[ClientSession], Awaitable[_T]], *, register: bool = False) -> _T:
    async def session() -> _T:
        server = create_mcp_server(answers, register=register)
        async with create_connected_server_and_client_session(server) as client:
            return await ask(client)

    return asyncio.run(session())


def call(answers: AnswerFields, tool: str, /, **arguments: Any) -> CallToolResult:
    return talk(answers, lambda client: client.call_tool(tool, arguments))


def told(result: CallToolResult) -> dict[str, Any]:
    assert not result.isError, result.content
    assert result.structuredContent is not None
    assert json.loads(text_of(result)) == result.structuredContent
    return result.structuredContent


def text_of(result: CallToolResult) -> str:
    (block,) = result.content
    assert isinstance(block, TextContent)
    return block.text


def test_a_client_sees_the_tools_and_which_of_them_write(answers: AnswerFields) -> None:
    async def tools(client: ClientSession) -> dict[str, bool | None]:
        listed = (await client.list_tools()).tools
        assert all(tool.description and tool.inputSchema["type"] == "object" for tool in listed)
        return {tool.name: tool.annotations.readOnlyHint for tool in listed if tool.annotations}

    reading = {"search_adapters": True, "describe_adapter": True, "ask": True, "ask_adapter": True}
    assert talk(answers, tools) == reading
    assert talk(answers, tools, register=True) == {**reading, "register_adapter": False}


def test_adapters_are_found_and_described(answers: AnswerFields) -> None:
    found = told(call(answers, "search_adapters", query="french please", k=2))["adapters"]
    assert (found[0]["name"], len(found)) == ("french", 2)
    assert told(call(answers, "describe_adapter", name="maths"))["examples"] == ["maths please"]


def test_a_prompt_is_answered_as_the_hub_answers_it(answers: AnswerFields, pool: LoraHub, base: Path) -> None:
    def expected(**routing: Any) -> str:
        (completion,) = pool.generate(
            ["french please"], base_model=base, routing=Routing(**routing), sampling=Sampling(max_new_tokens=4)
        )
        return completion.text.strip()

    asked = told(call(answers, "ask", prompt="french please"))
    assert asked["text"] == expected(k=2)
    assert asked["route"]["adapters"][0]["name"] == "french"
    assert asked["usage"]["completion_tokens"] <= 4
    one = told(call(answers, "ask_adapter", prompt="french please", name="poems"))
    assert one["text"] == expected(adapters=("poems",))
    assert [member["name"] for member in one["route"]["adapters"]] == ["poems"]
    assert one["text"] != asked["text"]


def test_what_is_refused_is_told_without_a_folder(answers: AnswerFields, pool: LoraHub, tmp_path: Path) -> None:
    shutil.rmtree(pool.get("maths").folder)
    for result, says in (
        (call(answers, "describe_adapter", name="frensh"), "did you mean 'french'"),
        (call(answers, "describe_adapter"), "name: Field required"),
        (call(answers, "search_adapters", query="x", namespace="tenant"), "namespace: Extra inputs"),
        (call(answers, "ask", prompt=" "), "empty"),
        (call(answers, "ask_adapter", prompt="x", name="maths"), "register it again"),
        (call(answers, "register_adapter", repo_id="user/x"), "there is no tool 'register_adapter'"),
    ):
        assert result.isError
        assert says in text_of(result)
        assert tmp_path.name not in text_of(result)


def test_what_fails_inside_is_not_told(answers: AnswerFields, pool: LoraHub) -> None:
    broken: list[bool] = []

    def before(texts: object) -> None:
        if broken:
            raise RuntimeError("the secret of /srv/encoders")

    pool.switch_encoder(Hashing("two", before))
    broken.append(True)
    result = call(answers, "search_adapters", query="anything")
    assert result.isError
    assert "secret" not in text_of(result)


def test_a_server_shows_one_namespace(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.register(tiny_adapter(tmp_path / "hidden", base, seed=9), samples=["secret"], namespace="tenant")
    here = AnswerFields(hub=pool, base_model=base, max_new_tokens=4, k=20)
    there = AnswerFields(hub=pool, base_model=base, max_new_tokens=4, namespace="tenant")
    assert "hidden" not in text_of(call(here, "search_adapters", query="secret", k=20))
    assert "hidden" not in text_of(call(here, "ask", prompt="secret"))
    asking: dict[str, dict[str, Any]] = {"describe_adapter": {}, "ask_adapter": {"prompt": "secret"}}
    for tool, more in asking.items():
        hidden, nobody = (text_of(call(here, tool, name=asked, **more)) for asked in ("hidden", "nobody"))
        assert hidden.replace("hidden", "nobody") == nobody
    assert told(call(there, "ask_adapter", name="hidden", prompt="secret"))["route"]["adapters"][0]["name"] == "hidden"


def test_a_client_may_register_where_it_was_allowed_to(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    with LocalHub() as server:
        server.publish("user/sums", tiny_adapter(tmp_path / "sums", base))
        hub = open_hub(encoder=Hashing("one"), endpoint=server.url, index="exact")
        fields = AnswerFields(hub=hub, base_model=base, namespace="mine")
        given = {"repo_id": "user/sums", "samples": ["1 + 2"]}
        result = talk(fields, lambda client: client.call_tool("register_adapter", given), register=True)
    assert told(result)["repo_id"] == "user/sums"
    assert [(adapter.name, adapter.namespace) for adapter in hub.list()] == [("user/sums", "mine")]


def test_a_question_that_its_client_gives_up_frees_its_row(open_hub: Callable[..., LoraHub], tmp_path: Path) -> None:
    endless = endless_base(tmp_path / "endless")
    hub = open_hub(encoder=Hashing("one"), index="exact")
    hub.register(tiny_adapter(tmp_path / "one", endless), samples=["one"])
    fields = AnswerFields(hub=hub, base_model=endless, max_new_tokens=30_000)
    engine = hub.engine(endless)

    async def give_up(client: ClientSession) -> None:
        asking = asyncio.create_task(client.call_tool("ask", {"prompt": "one"}))
        while not hub.stats()[0].running:
            await asyncio.sleep(0.01)
        # Others are answered meanwhile.
        assert not (await client.call_tool("search_adapters", {"query": "one"})).isError
        asking.cancel()

    talk(fields, give_up)
    while engine.stats().running:
        time.sleep(0.01)


# -- as a process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def database(pool: LoraHub, tmp_path: Path) -> Path:
    pool.close()
    return tmp_path / "hub.db"


def test_an_agent_s_tools_come_from_the_program(database: Path) -> None:
    program = Path(sys.executable).with_name("lora-hub")
    parameters = StdioServerParameters(
        command=str(program), args=["mcp", "--database", str(database), "--index", "exact", "--offline"]
    )

    async def session() -> tuple[str, Any, list[str]]:
        async with stdio_client(parameters) as streams, ClientSession(*streams) as client:
            hello = await client.initialize()
            tools = await load_mcp_tools(client)
            described = await tools[1].ainvoke({"name": "maths"})
            return f"{hello.serverInfo.name} {hello.serverInfo.version}", described, [tool.name for tool in tools]

    server, described, names = asyncio.run(session())
    assert server == f"lora-hub {__version__}"
    assert names == ["search_adapters", "describe_adapter", "ask", "ask_adapter"]
    assert json.loads(described[0]["text"])["name"] == "maths"


def test_nothing_but_the_protocol_is_on_standard_output(database: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"id": 1, "method": "initialize", "params": _HELLO},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": {"name": "describe_adapter", "arguments": {"name": "maths"}}},
    ]
    with subprocess.Popen(
        [sys.executable, "-c", NOISY, str(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = []
        for message in messages:
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
            process.stdin.flush()
            if "id" in message:
                lines.append(process.stdout.readline())
        rest, errors = process.communicate(timeout=60)
    assert [json.loads(line)["id"] for line in lines] == [1, 2], errors
    assert "maths please" in lines[1]
    assert rest == ""
    assert all(noise in errors for noise in ("printed", "written", "by a child", "after the end"))


_HELLO = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}


def test_the_program_tells_why_it_does_not_start(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("lora-hub")
    done = subprocess.run(
        [program, "mcp", "--database", str(tmp_path / "none.db")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not exist" in done.stderr
