"""``switch-encoder``: the encoder that a registry is searched with."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import Actor, AsJson, Database, Endpoint, Offline
from lora_hub_sdk.cli.progress import bar


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "switch-encoder")(switch_encoder)


def switch_encoder(
    reference: Annotated[str, typer.Argument(help="A folder, a Hub id, or the embedded all-minilm-l6-v2.")],
    *,
    instruction: Annotated[
        str | None,
        typer.Option(help="Put in front of every text; by default what the encoder's folder says, or the paper's."),
    ] = None,
    database: Database,
    endpoint: Endpoint = None,
    offline: Offline = False,
    actor: Actor = None,
    as_json: AsJson = False,
) -> Outcome:
    """Embed every adapter by another encoder, then search with that one, in every process; may be run again."""
    quiet_libraries()
    with (
        open_hub(database, endpoint, offline=offline, actor=actor) as hub,
        bar("embedding adapters", as_json=as_json) as move,
    ):
        embedded = hub.switch_encoder(reference, instruction=instruction, progress=move)
        encoder = hub.encoder
    data = {"encoder": encoder.name, "fingerprint": encoder.fingerprint, "embedded": embedded}
    return Outcome(data, Text(f"searched with {encoder.name} from now on; {embedded} adapters were embedded"))
