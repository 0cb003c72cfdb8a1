from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from lora_hub_sdk.errors import ConfigurationError, SchemaError
from lora_hub_sdk.registry.schema import current_version, ensure_schema, head, open_database, upgrade_schema
from lora_hub_sdk.registry.tables import Base


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "hub.db")


def test_an_empty_database_gets_the_tables_of_the_models(file: str) -> None:
    engine = open_database(file)
    ensure_schema(engine)
    assert current_version(engine) == head()
    found = inspect(engine)
    assert set(found.get_table_names()) == {*Base.metadata.tables, "alembic_version"}
    for table in Base.metadata.tables.values():
        columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
        assert columns == {column.name: column.nullable for column in table.columns}


def test_models_and_migrations_agree(file: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = open_database(file)
    ensure_schema(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_changes_nothing(file: str) -> None:
    ensure_schema(open_database(file))
    before = Path(file).read_bytes()
    ensure_schema(open_database(file))
    assert Path(file).read_bytes() == before


def test_sqlite_waits_and_writes_ahead(file: str) -> None:
    with open_database(file).connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 10_000
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_a_newer_database_is_refused_with_what_to_do(file: str) -> None:
    engine = open_database(file)
    ensure_schema(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for attempt in (ensure_schema, upgrade_schema):
        with pytest.raises(SchemaError, match="newer version"):
            attempt(engine)


def test_a_database_of_something_else_is_left_alone(file: str) -> None:
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(SchemaError, match="recipes"):
        ensure_schema(open_database(file))


def test_a_file_that_is_no_database_is_left_alone(file: str) -> None:
    Path(file).write_bytes(b"not a database at all, but long enough to be looked at" * 50)
    with pytest.raises(SchemaError, match="not a database"):
        ensure_schema(open_database(file))


@pytest.mark.parametrize("url", ["nosuch://x", "postgresql+nodriver://x/y"])
def test_a_url_that_cannot_be_opened_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        open_database(url)
