"""The ``lora-hub`` program: its groups of commands, put together."""

from __future__ import annotations

import typer

from lora_hub_sdk.cli import (
    adapters,
    answers,
    bench,
    calibration,
    database,
    demo,
    discovery,
    encoder,
    export,
    gate,
    history,
    keys,
    lifecycle,
    mcp,
    registration,
    retrieval,
    serve,
    training,
)

app = typer.Typer(
    name="lora-hub",
    help="Many LoRA adapters, one model: register them, find those that fit a prompt, answer with them.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of ours is for bug reports; locals in it could hold prompts and tokens.
    pretty_exceptions_show_locals=False,
)
groups = (
    demo,
    discovery,
    registration,
    adapters,
    answers,
    serve,
    mcp,
    export,
    retrieval,
    training,
    gate,
    calibration,
    bench,
    encoder,
    history,
    lifecycle,
    keys,
    database,
)
for commands in groups:
    commands.add_to(app)


def main() -> None:
    """Run the program; the entry point ``lora-hub``."""
    app()
