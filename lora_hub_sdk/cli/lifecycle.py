"""``pin``, ``unpin``, ``retire``, ``restore``, ``remove`` and ``gc``: from a registered adapter to freed files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import typer
from rich.filesize import decimal
from rich.text import Text

from lora_hub_sdk.cli.adapters import adapter_data
from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub
from lora_hub_sdk.cli.options import Actor, AdapterName, AsJson, Database, Namespace
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

if TYPE_CHECKING:
    from lora_hub_sdk.hub import LoraHub
    from lora_hub_sdk.registry.gc import Freed


class _Act(Protocol):
    def __call__(self, name: str, *, namespace: str) -> Adapter: ...


#: Command, the hub's method, what is said afterwards, and the help.
_CHANGES: Final[tuple[tuple[str, Callable[[LoraHub], _Act], str, str], ...]] = (
    ("pin", lambda hub: hub.pin, "{} is held at {}", "Hold an adapter at its revision; update refuses to move it."),
    ("unpin", lambda hub: hub.unpin, "{} at {} may be updated", "Let an adapter be updated again."),
    (
        "retire",
        lambda hub: hub.retire,
        "{} at {} is out of service",
        "Take an adapter out of service; it is kept, and neither found nor used.",
    ),
    ("restore", lambda hub: hub.restore, "{} at {} is in service", "Bring a retired adapter back into service."),
    (
        "remove",
        lambda hub: hub.remove,
        "removed {} at {}; its files stay in {}",
        "Forget an adapter, its samples, vectors and scores; its files stay until gc.",
    ),
)


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    for name, act, told, about in _CHANGES:
        command(app, name)(_change(act, told, about))
    command(app, "gc")(gc)


def gc(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be freed.")] = False,
    database: Database,
    as_json: AsJson = False,
) -> Outcome:
    """Free the files that this registry pulled and no adapter needs any more; local folders are never touched."""
    with open_hub(database) as hub:
        freed = hub.gc(dry_run=dry_run)
    return Outcome({**asdict(freed), "dry_run": dry_run}, Text(_told(freed, dry_run)))


def _change(act: Callable[[LoraHub], _Act], told: str, about: str) -> Callable[..., Outcome]:
    def change(
        name: AdapterName,
        *,
        database: Database,
        namespace: Namespace = DEFAULT_NAMESPACE,
        actor: Actor = None,
        as_json: AsJson = False,
    ) -> Outcome:
        with open_hub(database, actor=actor) as hub:
            adapter = act(hub)(name, namespace=namespace)
        return Outcome(adapter_data(adapter), Text(told.format(adapter.name, adapter.revision[:12], adapter.folder)))

    change.__doc__ = about
    return change


def _told(freed: Freed, dry_run: bool) -> str:
    line = "would free" if dry_run else "freed"
    line += f" {decimal(freed.size_bytes)}"
    if freed.commits:
        line += f": {', '.join(freed.commits)}"
    if freed.busy:
        line += f"\nleft alone, as they are being registered: {', '.join(freed.busy)}"
    return line
