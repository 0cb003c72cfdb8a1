"""``keys create``, ``keys list`` and ``keys revoke``: who may ask the server, and for which namespace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub
from lora_hub_sdk.cli.options import AsJson, Database, Namespace, OneNamespace
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from lora_hub_sdk.registry.api_keys import ApiKey, Right

_KeyName = Annotated[str, typer.Argument(help="Name of the key, by which lists and logs tell of it.")]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    group = typer.Typer(help="API keys of the server, each bound to one namespace.", no_args_is_help=True)
    command(group, "create")(create)
    command(group, "list")(list_keys)
    command(group, "revoke")(revoke)
    app.add_typer(group, name="keys")


def create(
    name: _KeyName,
    *,
    right: Annotated[
        list[str] | None,
        typer.Option(
            "--right",
            help="generate, read, register or metrics; repeated: all of them.",
            show_default="generate and read",
        ),
    ] = None,
    days: Annotated[
        float | None, typer.Option("--days", help="After so many days the key expires; by default never.")
    ] = None,
    database: Database,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Make a key; its secret is printed once, and only a hash of it is kept."""
    with open_hub(database, create=True) as hub:
        rights = cast("Sequence[Right]", right or ("generate", "read"))
        key, secret = hub.keys.create(name, namespace=namespace, rights=rights, expires_at=_end(days))
    told = f"key {key.name} for namespace {key.namespace}: {', '.join(key.rights)}{_until(key)}\n{secret}\n"
    # On a line of its own, that it can be copied whole.
    return Outcome({**_data(key), "secret": secret}, Text(f"{told}keep it well: it is not shown again", no_wrap=True))


def list_keys(*, database: Database, namespace: OneNamespace = None, as_json: AsJson = False) -> Outcome:
    """List every key that was made, revoked and expired ones too; no secrets."""
    with open_hub(database) as hub:
        found = [key for key in hub.keys.list() if namespace in (None, key.namespace)]
    return Outcome([_data(key) for key in found], _table(found) if found else Text("no keys"))


def revoke(name: _KeyName, *, database: Database, as_json: AsJson = False) -> Outcome:
    """End a key for ever; running servers notice within seconds."""
    with open_hub(database) as hub:
        key = hub.keys.revoke(name)
    return Outcome(_data(key), Text(f"key {key.name} is revoked"))


def _end(days: float | None) -> datetime | None:
    if days is None:
        return None
    try:
        return datetime.now(UTC) + timedelta(days=days)
    except (OverflowError, ValueError) as error:
        raise ConfigurationError(f"--days {days:g}: {error}") from error


def _data(key: ApiKey) -> dict[str, Any]:
    row = asdict(key)
    times = {name: None if row[name] is None else row[name].isoformat() for name in row if name.endswith("_at")}
    return {**row, "rights": list(key.rights), **times, "valid": key.is_valid()}


def _until(key: ApiKey) -> str:
    return "" if key.expires_at is None else f", until {_shown(key.expires_at)}"


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return f"revoked {_shown(key.revoked_at)}"
    return "expired" if not key.is_valid() else "valid"


def _table(keys: Sequence[ApiKey]) -> Table:
    table = Table()
    for column in ("name", "namespace", "rights", "secret", "made", "expires", "state"):
        table.add_column(column, overflow="fold")
    for key in keys:
        expires = "never" if key.expires_at is None else _shown(key.expires_at)
        rights, made = ", ".join(key.rights), _shown(key.created_at)
        table.add_row(*map(Text, (key.name, key.namespace, rights, f"{key.prefix}…", made, expires, _state(key))))
    return table


def _shown(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="minutes")
