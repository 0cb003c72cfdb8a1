"""The tools that agents are given over a hub, whichever framework or protocol hands them over."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.faces.adapter_facts import adapter_facts, described, purpose
from lora_hub_sdk.hub import LoraHub

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class SearchArguments(BaseModel):
    """What ``search_adapters`` takes."""

    model_config = ConfigDict(extra="forbid")

    # Decoding that is held to this schema cannot go on for ever in it.
    query: str = Field(description="A prompt of the task, or the task in words.", min_length=1, max_length=1000)
    k: int = Field(3, description="How many adapters to return.", ge=1, le=20)


class DescribeArguments(BaseModel):
    """What ``describe_adapter`` takes."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of an adapter, as search_adapters gives it.", min_length=1, max_length=512)


class RegisterArguments(BaseModel):
    """What ``register_adapter`` takes."""

    model_config = ConfigDict(extra="forbid")

    repo_id: str = Field(description="The adapter's repository on the Hub, like owner/name.")
    samples: list[str] | None = Field(None, description="Some prompts that the adapter is good at.")
    revision: str | None = Field(None, description="Branch, tag or commit; the main branch by default.")
    description: str | None = Field(None, description="What the adapter does, in a sentence.")


@dataclass(frozen=True, slots=True)
class HubTool:
    """One tool. ``run`` takes the hub, the namespace that its caller may see, and the validated arguments by name.

    What it returns is a JSON object; what it raises on purpose is a ``LoraHubError``.
    """

    name: str
    description: str
    arguments: type[BaseModel]
    run: Callable[..., dict[str, Any]]
    writes: bool = False


def hub_id(reference: str) -> str:
    """A reference that can only mean a repository of the Hub.

    Raises:
        ConfigurationError: it is no ``owner/name``, or would be read from a folder of this machine.
    """
    if not _HUB_ID.fullmatch(reference) or os.path.isdir(reference):
        raise ConfigurationError(f"{reference[:200]!r}: expected a repository of the Hub, like owner/name")
    return reference


def problems(error: ValidationError) -> str:
    """What is wrong with a call's arguments, for the model that wrote them."""
    found = (f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}" for one in error.errors())
    return f"the arguments cannot be used; {'; '.join(found)}"


def _search(hub: LoraHub, namespace: str, query: str, k: int) -> dict[str, Any]:
    hits = hub.search(query, k, namespace=namespace)
    # Short, as it stays in a model's context; describe_adapter tells the rest.
    told = [
        {"name": hit.adapter.name, "description": purpose(hub, hit.adapter), "score": round(hit.score, 3)}
        for hit in hits
    ]
    return {"adapters": told}


def _describe(hub: LoraHub, namespace: str, name: str) -> dict[str, Any]:
    return described(hub, name, namespace)


def _register(
    hub: LoraHub, namespace: str, repo_id: str, samples: list[str] | None, revision: str | None, description: str | None
) -> dict[str, Any]:
    adapter = hub.register(
        hub_id(repo_id),
        # None lets the adapter's card speak for it; an empty list says the same.
        samples=samples or None,
        revision=revision,
        description=description,
        namespace=namespace,
    )
    return adapter_facts(adapter)


READING: Final = (
    HubTool(
        "search_adapters",
        "Find the LoRA adapters that fit a task, the nearest first. Each has a name, what it does, and a score.",
        SearchArguments,
        _search,
    ),
    HubTool(
        "describe_adapter",
        "Tell all about one LoRA adapter by its name: what it does, examples of its prompts, its scores.",
        DescribeArguments,
        _describe,
    ),
)
REGISTER: Final = HubTool(
    "register_adapter",
    "Register a LoRA adapter of the Hub, so that it can be found and used.",
    RegisterArguments,
    _register,
    writes=True,
)
