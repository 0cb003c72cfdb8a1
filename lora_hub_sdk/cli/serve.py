"""``serve``: the hub over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Literal

import typer

from lora_hub_sdk.cli.command import errors_reported
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import (
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
from lora_hub_sdk.errors import MissingExtraError
from lora_hub_sdk.types import DEFAULT_NAMESPACE


def add_to(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("serve")(serve)


def serve(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    auth: Annotated[
        Literal["keys", "none"], typer.Option(help="keys: API keys of lora-hub keys; none: everybody on this machine.")
    ] = "keys",
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="With --auth none: other machines too, to ask and to read.")
    ] = False,
    base_model: AnsweringBase = "smollm2-135m-instruct",
    strategy: Annotated[
        str,
        typer.Option(
            help="selection, mixture, fusion, base; with --gate also ramole, moe-soft, moe-top3, moe-top1, smear, arrow"
        ),
    ] = "mixture",
    k: NearestCount = 3,
    weights: Annotated[str, typer.Option(help="uniform, similarity, fitted, sparse or gate.")] = "uniform",
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="For a strategy that a gate weighs, as train-gate's ramole; may be repeated.", metavar="FILE"
        ),
    ] = None,
    min_score: Floor = None,
    template: Annotated[
        Literal["auto", "chat", "alpaca", "adapter", "none"], typer.Option(help="How a prompt is framed for the model.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format of the base model.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quantization: Annotated[Literal["8bit", "4bit"] | None, typer.Option(help="Of the base model's weights.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Longest answer where a request does not say.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that can be asked for.")] = 4096,
    max_prompts: Annotated[int, typer.Option(help="Most prompts of one request.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds for an answer.")] = 300.0,
    requests_per_minute: Annotated[int | None, typer.Option(help="Of each key; by default any number.")] = None,
    concurrent_per_key: Annotated[
        int | None, typer.Option(help="Requests of a key at one time; by default any number.")
    ] = None,
    drain: Annotated[float, typer.Option(help="Seconds for running requests once it is told to stop.")] = 30.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for each request.")] = False,
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
) -> None:
    """Answer over HTTP in the form of OpenAI's interface, until it is told to stop.

    The base model is loaded first. --namespace counts with --auth none; a key brings its own.
    """
    with errors_reported(as_json=False):
        if find_spec("fastapi") is None or find_spec("uvicorn") is None:
            raise MissingExtraError("lora-hub serve", "server")
        from lora_hub_sdk.server.app import create_app
        from lora_hub_sdk.server.running import Server
        from lora_hub_sdk.server.settings import ServerSettings

        quiet_libraries()
        base = base_of(base_model)
        settings = ServerSettings(
            base_model=base,
            dtype=dtype,
            device=device,
            quantization=quantization,
            strategy=strategy,
            k=k,
            weights=weights,
            min_score=floor_of(min_score),
            template=template,
            namespace=namespace,
            auth=auth,
            open_to_all=open_to_all,
            max_body_bytes=max_body_bytes,
            max_prompts=max_prompts,
            new_tokens=new_tokens,
            max_new_tokens=max_new_tokens,
            timeout_s=timeout,
            requests_per_minute=requests_per_minute,
            concurrent_per_key=concurrent_per_key,
            drain_s=drain,
        )
        settings.check_host(host)
        with open_hub(database, endpoint, index=index, offline=offline) as hub:
            for file in gate or ():
                hub.use_gate(file, base_model=base)
            app = create_app(hub, settings)
            app.state.house.warm_up()
            Server(app, host, port, access_log=access_log).run()
