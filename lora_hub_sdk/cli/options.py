"""The options that several commands share, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_hub_sdk.config import default_database

Database = Annotated[
    str,
    typer.Option(
        "--database",
        default_factory=default_database,
        show_default="LORA_HUB_DATABASE, else hub.db",
        help="SQLite file or SQLAlchemy URL of the registry.",
    ),
]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help="A Hub other than https://huggingface.co.", metavar="URL")
]
Namespace = Annotated[str, typer.Option("--namespace", help="Where names are looked up and adapters searched.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
BaseModelFilter = Annotated[str | None, typer.Option("--base-model", help="Only adapters for this base model.")]
NearestCount = Annotated[int, typer.Option("-k", help="How many adapters to retrieve for a prompt.")]
