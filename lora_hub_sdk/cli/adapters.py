"""``register``, ``list``, ``show`` and ``remove``: what adapters exist."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import AsJson, BaseModelFilter, Database, Endpoint, Namespace
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

Sample = str | dict[str, Any]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    for name, body in (("register", register), ("list", list_adapters), ("show", show), ("remove", remove)):
        command(app, name)(body)


def register(
    reference: Annotated[str, typer.Argument(help="A Hub id (user/lora-x) or a local folder.")],
    *,
    samples: Annotated[
        str | None,
        typer.Option(help='JSON lines, each a text or an object with "inputs"; a .txt has plain lines; - is stdin.'),
    ] = None,
    sample: Annotated[list[str] | None, typer.Option(help="One sample; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option(help="Unique in its namespace; by default the Hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; pinned to its commit.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base that the adapter must be for.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag to search by; may be repeated.")] = None,
    description: Annotated[str | None, typer.Option(help="In place of the one in the adapter's card.")] = None,
    database: Database,
    endpoint: Endpoint = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Pull an adapter, check it, embed its samples and make it searchable."""
    given: list[Sample] = [*(_read_samples(samples) if samples else ()), *(sample or ())]
    quiet_libraries()
    with open_hub(database, endpoint, create=True) as hub:
        adapter = hub.register(
            reference,
            # None, not an empty list: what is registered already needs none.
            samples=given if samples or sample else None,
            name=name,
            revision=revision,
            base_model=base_model,
            tags=tag or (),
            description=description,
            namespace=namespace,
        )
    line = f"registered {adapter.name} at {adapter.revision[:12]}: rank {adapter.rank}, {adapter.sample_count} samples"
    return Outcome(adapter_data(adapter), Text(line))


def list_adapters(
    *,
    base_model: BaseModelFilter = None,
    namespace: Annotated[str | None, typer.Option(help="Only this namespace; by default all of them.")] = None,
    database: Database,
    as_json: AsJson = False,
) -> Outcome:
    """List the registered adapters."""
    with open_hub(database) as hub:
        found = hub.list(namespace=namespace, base_model=base_model)
    return Outcome([adapter_data(adapter) for adapter in found], _table(found))


def show(
    name: Annotated[str, typer.Argument(help="Name of a registered adapter.")],
    *,
    database: Database,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Show everything that is known of one adapter, its samples included."""
    with open_hub(database) as hub:
        adapter = hub.get(name, namespace=namespace)
        samples = hub.samples(name, namespace=namespace)
    return Outcome({**adapter_data(adapter), "samples": list(samples)}, _details(adapter, samples))


def remove(
    name: Annotated[str, typer.Argument(help="Name of a registered adapter.")],
    *,
    database: Database,
    endpoint: Endpoint = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Forget an adapter, its samples and its vectors; its files stay."""
    quiet_libraries()
    with open_hub(database, endpoint) as hub:
        adapter = hub.remove(name, namespace=namespace)
    return Outcome(adapter_data(adapter), Text(f"removed {adapter.name}; its files stay in {adapter.folder}"))


def adapter_data(adapter: Adapter) -> dict[str, Any]:
    """An adapter as JSON knows it: the fields of ``Adapter``, the time in ISO 8601."""
    return {
        **asdict(adapter),
        "folder": str(adapter.folder),
        "target_modules": list(adapter.target_modules),
        "tags": list(adapter.tags),
        "created_at": adapter.created_at.isoformat(),
    }


def _read_samples(source: str) -> list[Sample]:
    """The samples of a file, or of standard input.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not what it should be.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--samples {source!r} cannot be read: {error}") from error
    if Path(source).suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    # Not splitlines: JSON may hold U+2028 and the like as they are.
    return list(_json_lines(text.split("\n"), source))


def _json_lines(lines: list[str], source: str) -> Iterator[Sample]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"--samples {source!r}, line {number} is no JSON: {error}") from error
        if not isinstance(value, str | dict):
            raise ConfigurationError(
                f'--samples {source!r}, line {number}: expected a text or an object with "inputs", found {line[:80]}'
            )
        yield value


def _table(adapters: list[Adapter]) -> Table:
    table = Table(title=f"{len(adapters)} adapters", title_justify="left")
    table.add_column("name", overflow="fold")
    for column in ("base model", "rank", "alpha", "modules", "size", "samples", "revision", "licence"):
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
            adapter.license or "-",
        )
        table.add_row(*map(Text, cells))
    return table


def _details(adapter: Adapter, samples: tuple[str, ...]) -> Group:
    grid = Table.grid(padding=(0, 2))
    for field, value in adapter_data(adapter).items():
        shown = ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)
        grid.add_row(Text(field, style="bold"), Text(shown))
    return Group(grid, Text("samples", style="bold"), *(Text(f"  {sample}") for sample in samples))
