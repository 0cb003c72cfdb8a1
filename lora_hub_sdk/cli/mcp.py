"""``mcp``: the registry as tools for agents, over standard input and output."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_hub_sdk.cli.command import errors_reported
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import (
    Actor,
    AnsweringBase,
    Database,
    Endpoint,
    Floor,
    Index,
    Namespace,
    NearestCount,
    Offline,
    base_of,
    floor_of,
)
from lora_hub_sdk.types import DEFAULT_NAMESPACE


def add_to(app: typer.Typer) -> None:
    """Add this module's command. It has no result of its own: standard output is the protocol's."""
    app.command("mcp")(mcp)


def mcp(
    *,
    register: Annotated[bool, typer.Option("--register", help="Let agents register adapters of the Hub.")] = False,
    base_model: AnsweringBase = "smollm2-135m-instruct",
    strategy: Annotated[str, typer.Option(help="selection, mixture, fusion or base.")] = "mixture",
    k: NearestCount = 3,
    weights: Annotated[str, typer.Option(help="uniform, similarity, fitted, sparse or gate.")] = "uniform",
    min_score: Floor = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    timeout: Annotated[float | None, typer.Option(help="Give an answer up after so many seconds.")] = None,
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    actor: Actor = None,
) -> None:
    """Serve one namespace to an agent, by the Model Context Protocol over standard input and output."""
    with errors_reported(as_json=False):
        from lora_hub_sdk.mcp_server import create_mcp_server, serve_stdio

        quiet_libraries()
        from lora_hub_sdk.faces.answer_fields import AnswerFields

        with open_hub(database, endpoint, index=index, offline=offline, actor=actor, create=register) as hub:
            answers = AnswerFields(
                hub=hub,
                base_model=base_of(base_model),
                strategy=strategy,
                k=k,
                weights=weights,
                min_score=floor_of(min_score),
                namespace=namespace,
                max_new_tokens=max_new_tokens,
                timeout_s=timeout,
            )
            answers.use_fields()
            serve_stdio(create_mcp_server(answers, register=register))
