from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import MetaData, inspect, text

from lora_hub_sdk.errors import ConfigurationError, SchemaError, StorageError
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.schema import (
    _config,
    _run,
    current_version,
    ensure_schema,
    head,
    open_database,
    upgrade_schema,
)
from lora_hub_sdk.registry.tables import Base
from lora_hub_sdk.types import AdapterFilter
from tests.registry.entries import entry, unit
from tests.servers import free_port

#: Written by version 0.1 with schema 0001: an adapter removed, three left, two of them in one namespace.
OLD = Path(__file__).parent / "data" / "hub-0001.sqlite"
#: Written by version 0.5 with schema 0002: an adapter removed, three left, with revisions, tags, a score and a rule.
OLD_2 = OLD.with_name("hub-0002.sqlite")


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "hub.db")


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, file: str) -> str:
    return file if request.param == "sqlite" else str(request.getfixturevalue("postgres"))


def test_an_empty_database_gets_the_tables_of_the_models(database: str) -> None:
    engine = open_database(database)
    ensure_schema(engine)
    assert current_version(engine) == head()
    found = inspect(engine)
    assert set(found.get_table_names()) == {*Base.metadata.tables, "alembic_version"}
    for table in Base.metadata.tables.values():
        columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
        assert columns == {column.name: column.nullable for column in table.columns}


def test_models_and_migrations_agree(database: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = open_database(database)
    ensure_schema(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_an_old_database_is_refused_until_it_is_upgraded_and_then_has_everything(file: str) -> None:
    shutil.copy(OLD, file)
    before = Path(file).read_bytes()
    with pytest.raises(SchemaError, match="run: lora-hub db upgrade --database"):
        ensure_schema(open_database(file))
    with sqlite3.connect(file) as untouched:
        assert untouched.execute("select count(*) from adapters").fetchone() == (3,)
    assert upgrade_schema(open_database(file)) == head()
    assert before != Path(file).read_bytes()
    registry = Registry(file, index="exact", encoder=lambda: "e" * 64)
    french, sums, private = registry.adapters()
    assert (french.name, french.namespace, french.digest) == ("user/lora-fr", "default", "1" * 64)
    assert (french.tags, french.description, french.license) == (("lora", "french"), "To French", "mit")
    assert registry.samples(french) == ("Translate: cat", "Übersetze: Hund 猫")
    assert (sums.revision, sums.target_modules, sums.license) == ("b" * 40, ("q_proj", "v_proj"), None)
    assert (private.namespace, private.origin, private.sample_count) == ("team", "owner", 0)
    assert [adapter.state for adapter in registry.adapters()] == ["active"] * 3
    (hits,) = registry.search([np.array([1, 0, 0], dtype=np.float32)], 9, AdapterFilter())
    assert [(hit.adapter.name, round(hit.score, 5)) for hit in hits] == [("user/lora-fr", 1), ("user/lora-sum", 0)]
    assert registry.verify().agrees
    assert {event.action for event in registry.events(None, None, 9)} == {"migrated"}
    # Ids go on where they stopped, so that no event and no key of an index speaks of another adapter.
    added = registry.add(entry("new", unit(1, 1, 1)))
    assert added.id > max(french.id, sums.id, private.id)
    assert registry.remove("user/lora-sum", "default") == sums
    registry.close()


def test_a_database_of_schema_0002_gets_keys_and_keeps_everything(file: str) -> None:
    shutil.copy(OLD_2, file)
    with sqlite3.connect(file) as old:
        before = list(old.iterdump())
    with pytest.raises(SchemaError, match=r"schema 0002, this package speaks .*; run: lora-hub db upgrade --database"):
        ensure_schema(open_database(file))
    assert upgrade_schema(open_database(file)) == head()
    with sqlite3.connect(file) as new:
        after = set(new.iterdump())
    version = "INSERT INTO \"alembic_version\" VALUES('0002');"
    assert version in before
    assert set(before) - after == {version}
    registry = Registry(file, index="exact", encoder=lambda: "e" * 64)
    french, sums, private = registry.adapters()
    assert (french.name, french.revision, french.pinned, french.tags) == ("lora-fr", "b" * 40, True, ("french",))
    assert (sums.state, private.namespace, private.origin) == ("retired", "team", "owner")
    assert [score.value for score in registry.scores(french)] == [31.5]
    assert registry.verify().agrees
    assert registry.keys.list() == ()
    key, secret = registry.keys.create("ann", namespace="team")
    assert registry.keys.find(secret) == key
    registry.close()


def test_a_postgres_database_of_schema_0002_gets_keys_too(postgres: str) -> None:
    from alembic import command

    engine = open_database(postgres)
    _run(engine, _config(), lambda config, _: command.upgrade(config, "0002"))
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO namespaces VALUES ('team', now())"))
    with pytest.raises(SchemaError, match="run: lora-hub db upgrade"):
        ensure_schema(engine)
    assert upgrade_schema(engine) == head()
    registry = Registry(postgres, index="exact", encoder=lambda: "e" * 64)
    assert registry.namespaces() == ["team"]
    key, secret = registry.keys.create("ann", namespace="team")
    assert registry.keys.find(secret) == key
    registry.close()


def test_an_old_postgres_database_is_upgraded_too(postgres: str) -> None:
    from alembic import command

    engine = open_database(postgres)
    _run(engine, _config(), lambda config, _: command.upgrade(config, "0001"))
    with sqlite3.connect(f"file:{OLD}?mode=ro", uri=True) as old, engine.begin() as connection:
        old.row_factory = sqlite3.Row
        metadata = MetaData()
        metadata.reflect(connection)
        for name in ("meta", "adapters", "samples", "encoders", "embeddings"):
            rows = [dict(row) for row in old.execute(f"select * from {name}")]
            for row in rows:
                for column in ("tags", "target_modules"):
                    if column in row:
                        row[column] = json.loads(row[column])
                if "created_at" in row:
                    row["created_at"] = datetime.fromisoformat(row["created_at"]).replace(tzinfo=UTC)
                if name == "meta":
                    connection.execute(metadata.tables[name].delete().where(metadata.tables[name].c.key == row["key"]))
            connection.execute(metadata.tables[name].insert(), rows)
    with pytest.raises(SchemaError, match="run: lora-hub db upgrade"):
        ensure_schema(engine)
    assert upgrade_schema(engine) == head()
    registry = Registry(postgres, index="exact", encoder=lambda: "e" * 64)
    known = registry.adapters()
    assert [adapter.name for adapter in known] == ["user/lora-fr", "user/lora-sum", "user/lora-fr"]
    assert registry.add(entry("new", unit(1, 1, 1))).id > max(adapter.id for adapter in known)
    assert registry.verify().agrees
    registry.close()


def test_an_upgrade_killed_half_way_leaves_the_old_database(file: str) -> None:
    shutil.copy(OLD, file)
    script = """
import os, signal, sys
from alembic.operations import Operations
from lora_hub_sdk.registry.schema import open_database, upgrade_schema
left = int(sys.argv[2])
original = Operations.create_table
def counted(self, *args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
Operations.create_table = counted
upgrade_schema(open_database(sys.argv[1]))
"""
    for tables in (0, 2, 5, 9):
        ended = subprocess.run([sys.executable, "-c", script, file, str(tables)], check=False)
        assert ended.returncode == -signal.SIGKILL
        with sqlite3.connect(file) as old:
            assert old.execute("select version_num from alembic_version").fetchone() == ("0001",)
            assert old.execute("select count(*) from adapters").fetchone() == (3,)
            assert old.execute("select count(*) from embeddings").fetchone() == (3,)
    upgrade_schema(open_database(file))
    assert len(Registry(file, index="exact", encoder=lambda: "e" * 64).adapters()) == 3


def test_processes_that_open_an_empty_database_at_once_make_it_once(database: str) -> None:
    script = """
import sys
from lora_hub_sdk.registry.registry import Registry
registry = Registry(sys.argv[1], index="exact", encoder=lambda: "e" * 64)
print(registry.store.registry_id)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", script, database], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(told) == 1


def test_opening_again_changes_nothing(file: str) -> None:
    ensure_schema(open_database(file))
    before = Path(file).read_bytes()
    ensure_schema(open_database(file))
    assert Path(file).read_bytes() == before


def test_sqlite_waits_and_writes_ahead(file: str) -> None:
    with open_database(file).connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 30_000
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


@pytest.mark.parametrize("url", ["nosuch://ann:secret@x", "postgresql+nodriver://ann:secret@x/y", "://:x@"])
def test_a_url_that_cannot_be_opened_is_a_configuration_error_that_tells_no_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be opened") as refused:
        open_database(url)
    assert "secret" not in str(refused.value)


def test_a_database_that_does_not_answer_is_a_storage_error(file: str, tmp_path: Path) -> None:
    nobody = f"postgresql://ann:secret@127.0.0.1:{free_port()}/hub?connect_timeout=2"
    with pytest.raises(StorageError, match="try again") as refused:
        Registry(nobody, index="exact", encoder=lambda: "e" * 64)
    assert "secret" not in str(refused.value)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StorageError, match="unable to open"):
        Registry(str(tmp_path / "folder.db"), index="exact", encoder=lambda: "e" * 64)
    registry = Registry(file, index="exact", encoder=lambda: "e" * 64)
    registry.add(entry("kept", unit(1, 0, 0)))
    with registry._engine.connect() as full:
        full.exec_driver_sql(f"pragma max_page_count={full.exec_driver_sql('pragma page_count').scalar()}")
        full.commit()
    more = (entry(f"more {number}", unit(1, 0, 0), samples=("x" * 10_000,)) for number in range(100))
    with pytest.raises(StorageError, match="full"):
        list(map(registry.add, more))
    again = Registry(file, index="exact", encoder=lambda: "e" * 64)
    assert again.get("kept", "default").sample_count == 2
    assert {event.name for event in again.events(None, None, 999)} == {adapter.name for adapter in again.adapters()}
    registry.close()
    again.close()
