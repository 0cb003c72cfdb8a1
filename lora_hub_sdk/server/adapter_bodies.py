"""The bodies of the routes of adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_hub_sdk.server.fields import Body, Name, Names

#: An owner and a name, as the Hub has them; never a path.
RepoId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$")]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,254}$")]
Sample = Annotated[str, Field(min_length=1)]


class SearchBody(Body):
    """``POST /v1/adapters/search``."""

    query: Annotated[str, Field(min_length=1, description="A prompt of the task.")]
    k: Annotated[int, Field(ge=1, le=100)] = 10
    tags: Names | None = None
    exclude: Names | None = None
    min_trust: Literal["low", "medium", "high"] = "low"
    rerank: bool | None = None


class RegisterBody(Body):
    """``POST /v1/adapters``."""

    repo_id: Annotated[RepoId, Field(description="A repository of the Hub that the server uses.")]
    revision: Annotated[Revision | None, Field(description="Branch, tag or commit.")] = None
    name: Annotated[Name | None, Field(description="The repository's id where none is given.")] = None
    samples: Annotated[
        list[Sample] | None, Field(min_length=1, max_length=4096, description="Prompts that the adapter is good at.")
    ] = None
    embedding: Annotated[
        list[float] | None, Field(min_length=1, max_length=16384, description="Its own vector, instead of samples.")
    ] = None
    base_model: Annotated[RepoId | None, Field(description="The base that it must be for.")] = None
    description: Annotated[str | None, Field(max_length=4096)] = None
    tags: Names | None = None
    keep_samples: bool = True
