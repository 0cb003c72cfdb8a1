"""A hub's tools for LangChain agents: to look for adapters, and to ask one of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from langchain_core.outputs import LLMResult
from langchain_core.runnables import ensure_config
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, Field, ValidationError

from langchain_lora_hub.llm import LoraRetrieverLLM
from langchain_lora_hub.namespaces import configured_namespace
from lora_hub_sdk.errors import ConfigurationError, LoraHubError
from lora_hub_sdk.faces.adapter_facts import error_text, purpose
from lora_hub_sdk.faces.hub_tools import READING, REGISTER, HubTool, problems
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.types import DEFAULT_NAMESPACE

#: What models and their servers take for the name of a tool.
_LONGEST_NAME: Final = 64


class AskArguments(BaseModel):
    """What an adapter's tool takes."""

    prompt: str = Field(description="The whole task in words; the adapter sees nothing else.", min_length=1)


def hub_tools(hub: LoraHub, *, namespace: str = DEFAULT_NAMESPACE, register: bool = False) -> list[BaseTool]:
    """``search_adapters`` and ``describe_adapter`` for an agent, and ``register_adapter`` where that is asked for.

    They answer with JSON. What the hub refuses reaches the agent as a tool's error that it can read, so that it may try
    something else. They see one namespace: ``namespace``, or that of ``config={"configurable": {"namespace": ...}}``.

    Args:
        register: whether the agent may register adapters of the Hub, never folders of this machine.
    """
    return [_lent(hub, namespace, tool) for tool in (*READING, *([REGISTER] if register else []))]


def adapter_tool(
    hub: LoraHub,
    name: str,
    *,
    base_model: str | Path | None = None,
    namespace: str = DEFAULT_NAMESPACE,
    description: str | None = None,
    **options: Any,
) -> BaseTool:
    """One registered adapter as a tool, ``ask_<name>``: an agent hands it a prompt and gets its answer.

    The route, the base model, the token counts and the like are the tool message's ``artifact``.

    Args:
        base_model: the model that the adapter is for; None takes the one that it was registered with.
        description: what tells the agent when to call it; None takes the adapter's own, or some of its samples.
        options: fields of ``LoraRetrieverLLM``, like ``max_new_tokens``.

    Raises:
        AdapterNotFoundError: there is none of that name.
        ConfigurationError: options that no call could use.
    """
    if "adapters" in options:
        raise ConfigurationError(f"adapter_tool: the adapter is {name!r}; leave adapters=... out")
    if description is None:
        adapter = hub.get(name, namespace=namespace)
        description = f"Ask the LoRA adapter {name}. {purpose(hub, adapter)}".strip()
    llm = LoraRetrieverLLM(hub=hub, base_model=base_model, namespace=namespace, adapters=(name,), **options)

    def ask(prompt: str) -> tuple[str, dict[str, Any]]:
        config = ensure_config()
        with _readable():
            return _answer(llm.generate([prompt], callbacks=config.get("callbacks")))

    async def ask_async(prompt: str) -> tuple[str, dict[str, Any]]:
        config = ensure_config()
        with _readable():
            return _answer(await llm.agenerate([prompt], callbacks=config.get("callbacks")))

    return StructuredTool(
        name=f"ask_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}"[:_LONGEST_NAME],
        description=description,
        args_schema=AskArguments,
        func=ask,
        coroutine=ask_async,
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=_problems,
    )


def _lent(hub: LoraHub, namespace: str, tool: HubTool) -> BaseTool:
    def run(**arguments: Any) -> dict[str, Any]:
        asked = configured_namespace()
        with _readable():
            return tool.run(hub, namespace if asked is None else asked, **arguments)

    async def run_async(**arguments: Any) -> dict[str, Any]:
        return await asyncio.to_thread(run, **arguments)

    return StructuredTool(
        name=tool.name,
        description=tool.description,
        args_schema=tool.arguments,
        func=run,
        coroutine=run_async,
        handle_tool_error=True,
        handle_validation_error=_problems,
    )


@contextmanager
def _readable() -> Iterator[None]:
    """What the hub refuses inside of it leaves in the form that an agent is shown.

    Raises:
        ToolException: instead of the hub's error.
    """
    try:
        yield
    except LoraHubError as error:
        raise ToolException(error_text(error)) from error


def _answer(result: LLMResult) -> tuple[str, dict[str, Any]]:
    generation = result.generations[0][0]
    return generation.text.strip(), generation.generation_info or {}


def _problems(error: Any) -> str:
    return problems(error) if isinstance(error, ValidationError) else str(error)
