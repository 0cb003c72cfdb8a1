"""``score`` and ``events``: how adapters did, and who did what to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub
from lora_hub_sdk.cli.options import Actor, AdapterName, AsJson, Database, Namespace, OneNamespace
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Event


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    # A score below zero looks like an option.
    command(app, "score", ignore_unknown_options=True)(score)
    command(app, "events")(events)


def score(
    name: AdapterName,
    task: Annotated[str, typer.Argument(help="What was measured, like sst2.")],
    metric: Annotated[str, typer.Argument(help="By what, like accuracy.")],
    value: Annotated[float, typer.Argument(help="How it did; higher is taken as better.")],
    *,
    database: Database,
    namespace: Namespace = DEFAULT_NAMESPACE,
    actor: Actor = None,
    as_json: AsJson = False,
) -> Outcome:
    """Keep how an adapter's present content did at a task; measured again, the score is replaced."""
    with open_hub(database, actor=actor) as hub:
        adapter = hub.record_score(name, task, metric, value, namespace=namespace)
    data = {"name": adapter.name, "namespace": adapter.namespace, "revision": adapter.revision}
    line = f"{task}/{metric} = {value:g} for {adapter.name} at {adapter.revision[:12]}"
    return Outcome({**data, "task": task, "metric": metric, "value": value}, Text(line))


def events(
    name: Annotated[str | None, typer.Argument(help="Only what happened to this adapter.")] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = 20,
    database: Database,
    namespace: OneNamespace = None,
    as_json: AsJson = False,
) -> Outcome:
    """Tell who registered, updated, retired or removed what, and when."""
    with open_hub(database) as hub:
        found = hub.events(name, namespace=namespace, limit=limit)
    data = [{**asdict(event), "at": event.at.isoformat()} for event in found]
    return Outcome(data, _table(found) if found else Text("no events"))


def _table(found: Sequence[Event]) -> Table:
    table = Table()
    for column in ("at", "actor", "action", "namespace", "name", "detail"):
        table.add_column(column, overflow="fold")
    for event in found:
        detail = ", ".join(f"{key}={value}" for key, value in event.detail.items() if value is not None)
        at = event.at.isoformat(sep=" ", timespec="seconds")
        table.add_row(*map(Text, (at, event.actor, event.action, event.namespace, event.name, detail)))
    return table
