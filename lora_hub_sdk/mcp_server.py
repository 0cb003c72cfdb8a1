"""The hub as a server of the Model Context Protocol: its tools, and questions to its adapters."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_hub_sdk import __version__
from lora_hub_sdk.errors import LoraHubError, MissingExtraError
from lora_hub_sdk.faces.adapter_facts import error_text, route_facts, shown_name
from lora_hub_sdk.faces.answer_fields import AnswerFields
from lora_hub_sdk.faces.hub_tools import READING, REGISTER, HubTool, problems
from lora_hub_sdk.types import Completion

try:
    import anyio
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.types import CallToolResult, TextContent, Tool, ToolAnnotations
except ModuleNotFoundError as error:
    raise MissingExtraError("the MCP server", "mcp") from error

_log = logging.getLogger(__name__)
_INSTRUCTIONS: Final = (
    "A registry of LoRA adapters, each good at one task. search_adapters finds those for a task, describe_adapter "
    "tells more of one. ask answers a prompt with the adapters that fit it, ask_adapter with one that you name."
)


class AskArguments(BaseModel):
    """What ``ask`` takes."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="The whole task in words; nothing else of this conversation is seen.", min_length=1)


class AskAdapterArguments(AskArguments):
    """What ``ask_adapter`` takes."""

    name: str = Field(description="Name of an adapter, as search_adapters gives it.", min_length=1)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A tool of this server: how clients see it, the form of its arguments, and what answers a call."""

    tool: Tool
    arguments: type[BaseModel]
    answer: Callable[..., Awaitable[dict[str, Any]]]


def create_mcp_server(answers: AnswerFields, *, register: bool = False) -> Server[Any, Any]:
    """A server with the tools ``search_adapters``, ``describe_adapter``, ``ask`` and ``ask_adapter``.

    What the hub refuses is a tool's error with a text that a model can read; it names no folder, and nothing of other
    namespaces.

    Args:
        answers: the hub, the one namespace that clients see, and how prompts are answered.
        register: whether clients may register adapters of the Hub, with ``register_adapter``.
    """
    server: Server[Any, Any] = Server("lora-hub", version=__version__, instructions=_INSTRUCTIONS)
    offers = {offer.tool.name: offer for offer in _offers(answers, register)}

    async def tools() -> list[Tool]:
        return [offer.tool for offer in offers.values()]

    async def call(name: str, arguments: dict[str, Any]) -> CallToolResult:
        if name not in offers:
            return _result(f"there is no tool {name[:80]!r}; these there are: {', '.join(offers)}", failed=True)
        offer = offers[name]
        try:
            given = offer.arguments.model_validate(arguments)
            told = await offer.answer(**given.model_dump())
        except ValidationError as error:
            return _result(problems(error), failed=True)
        except LoraHubError as error:
            return _result(error_text(error), failed=True)
        except Exception:
            # Whatever it says, it was not written for others to read.
            _log.exception("tool %s failed", name)
            return _result("this tool failed inside the server; its log tells why", failed=True)
        return _result(json.dumps(told, ensure_ascii=False), told)

    server.list_tools()(tools)  # type: ignore[no-untyped-call]
    # The arguments are checked here, in words of ours.
    server.call_tool(validate_input=False)(call)
    return server


def serve_stdio(server: Server[Any, Any]) -> None:
    """Serve the client at this process's standard input and output, until it hangs up.

    From then on nothing else of this process writes to standard output: prints, and what libraries and child processes
    write, go to standard error.
    """
    anyio.run(_serve, server)


async def _serve(server: Server[Any, Any]) -> None:
    with _own_stdout() as stdout:
        async with stdio_server(stdout=anyio.wrap_file(stdout)) as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())


@contextmanager
def _own_stdout() -> Iterator[TextIO]:
    sys.stdout.flush()
    protocol = os.dup(1)
    os.dup2(2, 1)
    with io.TextIOWrapper(os.fdopen(protocol, "wb"), encoding="utf-8", newline="\n") as stream:
        yield stream


def _offers(answers: AnswerFields, register: bool) -> Iterator[_Offer]:
    for tool in (*READING, *([REGISTER] if register else [])):
        yield _Offer(_shown(tool), tool.arguments, partial(_run, tool, answers))
    for name, description, arguments, answer in (
        ("ask", "Answer a prompt with the LoRA adapters that fit it.", AskArguments, _ask),
        ("ask_adapter", "Answer a prompt with one LoRA adapter.", AskAdapterArguments, _ask_adapter),
    ):
        shown = Tool(
            name=name,
            description=description,
            inputSchema=arguments.model_json_schema(),
            annotations=ToolAnnotations(readOnlyHint=True, openWorldHint=False),
        )
        yield _Offer(shown, arguments, partial(answer, answers))


def _shown(tool: HubTool) -> Tool:
    hints = ToolAnnotations(readOnlyHint=not tool.writes, destructiveHint=False, openWorldHint=tool.writes)
    schema = tool.arguments.model_json_schema()
    return Tool(name=tool.name, description=tool.description, inputSchema=schema, annotations=hints)


async def _run(tool: HubTool, answers: AnswerFields, **arguments: Any) -> dict[str, Any]:
    return await asyncio.to_thread(tool.run, answers.hub, answers.namespace, **arguments)


async def _ask(answers: AnswerFields, prompt: str, **given: Any) -> dict[str, Any]:
    (completion,) = await answers.hub.agenerate([prompt], **answers.asked(given))
    return _answer(completion)


async def _ask_adapter(answers: AnswerFields, prompt: str, name: str) -> dict[str, Any]:
    # Whatever way several adapters are combined, one is itself.
    return await _ask(answers, prompt, adapters=(name,), strategy="selection", weights="uniform")


def _answer(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text.strip(),
        "finish_reason": completion.finish_reason,
        "base_model": shown_name(completion.trace.base_model),
        "route": route_facts(completion.trace.route),
        "usage": completion.usage.as_dict(),
    }


def _result(text: str, structured: dict[str, Any] | None = None, *, failed: bool = False) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], structuredContent=structured, isError=failed)
