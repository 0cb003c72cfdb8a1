"""``verify``, ``reindex``, ``db upgrade`` and ``db check``: whether the registry is in order, and putting it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries, require_database
from lora_hub_sdk.cli.options import Actor, AsJson, Database, Endpoint, Index
from lora_hub_sdk.cli.progress import bar

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lora_hub_sdk.registry.follower import Verification


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "verify")(verify)
    command(app, "reindex")(reindex)
    group = typer.Typer(help="The schema of the registry's database.", no_args_is_help=True)
    command(group, "upgrade")(upgrade)
    command(group, "check")(check)
    app.add_typer(group, name="db")


def verify(*, database: Database, index: Index, endpoint: Endpoint = None, as_json: AsJson = False) -> Outcome:
    """Compare the vector index with the database; exit code 1 where they differ."""
    quiet_libraries()
    with open_hub(database, endpoint, index=index) as hub:
        found = hub.verify()
    data = {"agrees": found.agrees, **{name: _plain(value) for name, value in asdict(found).items()}}
    return Outcome(data, Text(_verdict(found)), exit_code=0 if found.agrees else 1)


def reindex(
    *, database: Database, index: Index, endpoint: Endpoint = None, actor: Actor = None, as_json: AsJson = False
) -> Outcome:
    """Embed what has no vector under the current encoder, and write the vector index anew."""
    quiet_libraries()
    with (
        open_hub(database, endpoint, index=index, actor=actor) as hub,
        bar("writing the index", as_json=as_json) as move,
    ):
        count = hub.reindex(move)
    return Outcome({"vectors": count}, Text(f"the index holds {count} vectors"))


def upgrade(*, database: Database, as_json: AsJson = False) -> Outcome:
    """Bring the database to the schema of this version; an empty one gets its tables."""
    from lora_hub_sdk.registry.schema import current_version, upgrade_schema

    with _engine(database) as engine:
        before = current_version(engine)
        after = upgrade_schema(engine)
    line = f"schema {after} is current" if before == after else f"upgraded from {before or 'nothing'} to {after}"
    return Outcome({"from": before, "to": after}, Text(line))


def check(*, database: Database, as_json: AsJson = False) -> Outcome:
    """Say which schema the database has and which one this version speaks; exit code 1 where they differ."""
    from lora_hub_sdk.registry.schema import current_version, head

    require_database(database)
    with _engine(database) as engine:
        current, newest = current_version(engine), head()
    line = f"current {current or 'none'}, head {newest}"
    return Outcome({"current": current, "head": newest}, Text(line), exit_code=0 if current == newest else 1)


@contextmanager
def _engine(database: str) -> Iterator[Engine]:
    """A database without the check that a hub makes.

    Raises:
        SchemaError: it cannot be read.
    """
    from sqlalchemy.exc import DatabaseError

    from lora_hub_sdk.errors import SchemaError
    from lora_hub_sdk.registry.schema import open_database

    engine = open_database(database)
    try:
        yield engine
    except DatabaseError as error:
        raise SchemaError(f"database {database!r} cannot be read: {error.orig}") from error
    finally:
        engine.dispose()


def _verdict(found: Verification) -> str:
    if found.agrees:
        verdict = f"index and database agree on {found.vectors} vectors"
    else:
        verdict = (
            f"of {found.vectors} vectors the index lacks {len(found.missing)}, has {len(found.changed)} changed and "
            f"{len(found.surplus)} too many; run: lora-hub reindex"
        )
    if found.unembedded:
        verdict += f"\nnot searchable under the current encoder: {', '.join(found.unembedded)}; run: lora-hub reindex"
    return verdict


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
