"""``list``, ``show`` and ``namespaces``: what adapters exist."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub
from lora_hub_sdk.cli.options import AdapterName, AsJson, BaseModelFilter, Database, Namespace, OneNamespace
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter, Score


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "list")(list_adapters)
    command(app, "show")(show)
    command(app, "namespaces")(namespaces)


def list_adapters(
    *,
    base_model: BaseModelFilter = None,
    namespace: OneNamespace = None,
    database: Database,
    as_json: AsJson = False,
) -> Outcome:
    """List the registered adapters, retired ones too."""
    with open_hub(database) as hub:
        found = hub.list(namespace=namespace, base_model=base_model)
    return Outcome([adapter_data(adapter) for adapter in found], _table(found))


def show(
    name: AdapterName,
    *,
    database: Database,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Show everything that is known of one adapter, its samples and scores included."""
    with open_hub(database) as hub:
        adapter = hub.get(name, namespace=namespace)
        samples = hub.samples(name, namespace=namespace)
        scores = hub.scores(name, namespace=namespace)
    data = {**adapter_data(adapter), "samples": list(samples), "scores": [_score_data(score) for score in scores]}
    return Outcome(data, _details(adapter, samples, scores))


def namespaces(*, database: Database, as_json: AsJson = False) -> Outcome:
    """List the namespaces that something was registered in."""
    with open_hub(database) as hub:
        found = hub.namespaces()
    return Outcome(found, Text("\n".join(found) or "no namespaces"))


def adapter_data(adapter: Adapter) -> dict[str, Any]:
    """An adapter as JSON knows it: the fields of ``Adapter``, times in ISO 8601."""
    return {
        **asdict(adapter),
        "folder": str(adapter.folder),
        "target_modules": list(adapter.target_modules),
        "tags": list(adapter.tags),
        "created_at": adapter.created_at.isoformat(),
        "updated_at": adapter.updated_at.isoformat(),
    }


def _score_data(score: Score) -> dict[str, Any]:
    return {**asdict(score), "recorded_at": score.recorded_at.isoformat()}


def _table(adapters: list[Adapter]) -> Table:
    table = Table(title=f"{len(adapters)} adapters", title_justify="left")
    table.add_column("name", overflow="fold")
    for column in ("base model", "rank", "alpha", "modules", "size", "samples", "revision", "state", "licence"):
        table.add_column(column, justify="right" if column in {"rank", "alpha", "size", "samples"} else "left")
    for adapter in adapters:
        cells = (
            adapter.name,
            adapter.base_model,
            str(adapter.rank),
            f"{adapter.alpha:g}",
            ", ".join(adapter.target_modules),
            decimal(adapter.size_bytes),
            str(adapter.sample_count),
            adapter.revision[:12],
            f"{adapter.state}, pinned" if adapter.pinned else adapter.state,
            adapter.license or "-",
        )
        table.add_row(*map(Text, cells))
    return table


def _details(adapter: Adapter, samples: tuple[str, ...], scores: list[Score]) -> Group:
    grid = Table.grid(padding=(0, 2))
    for field, value in adapter_data(adapter).items():
        shown = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        grid.add_row(Text(field, style="bold"), Text(shown or "-"))
    parts = [("samples", list(samples)), ("scores", [_score_line(score) for score in scores])]
    lists = (
        Text(f"{title}\n", style="bold").append("\n".join(f"  {line}" for line in lines), style="not bold")
        for title, lines in parts
        if lines
    )
    return Group(grid, *lists)


def _score_line(score: Score) -> str:
    line = f"{score.task}/{score.metric} = {score.value:g}, {score.recorded_at:%Y-%m-%d}"
    return line if score.current else f"{line}, of an earlier content ({score.revision[:12]})"
