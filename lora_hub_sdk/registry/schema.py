"""Opening a database, and bringing its schema to the version that this package speaks."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError, SchemaError, StorageError

if TYPE_CHECKING:
    from alembic.config import Config

_BUSY_TIMEOUT_MS: Final = 30_000
#: Held in PostgreSQL while the schema is made, so that of several processes only one makes it. Any constant will do.
_MIGRATION_LOCK: Final = 0x10A4_4B5D


def open_database(database: str) -> Engine:
    """An engine for a file path, ":memory:", or an SQLAlchemy URL. SQLite runs in WAL mode with a busy timeout.

    Raises:
        ConfigurationError: a URL that SQLAlchemy does not understand.
    """
    try:
        url = database_url(database)
        if url.get_backend_name() != "sqlite":
            engine = create_engine(url, pool_pre_ping=True)
            event.listen(engine, "handle_error", _translate)
            return engine
        file = sqlite_file(url)
        if file is None:
            # One connection, lent to one thread at a time: every further one would be an empty database of its own.
            once: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
            engine = create_engine(url, connect_args={"check_same_thread": False}, **once)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            engine = create_engine(url)
    except (ArgumentError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
            raise MissingExtraError("a PostgreSQL database", "postgres") from error
        shown = re.sub(r"//([^/@:]*):[^@]*@", r"//\1:***@", database)  # a password is nobody else's business
        raise ConfigurationError(f"database {shown!r} cannot be opened: {error}") from error
    event.listen(engine, "handle_error", _translate)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def database_url(database: str) -> URL:
    """The SQLAlchemy URL of a file path, ":memory:", or a URL; PostgreSQL is spoken by psycopg."""
    if "://" in database:
        url = make_url(database)
        return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url
    name = database if database == ":memory:" else str(Path(database).expanduser())
    return URL.create("sqlite", database=name)


def sqlite_file(url: URL) -> Path | None:
    """The file behind a SQLite URL; None for databases in memory and on servers."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


def _translate(context: ExceptionContext) -> None:
    """Trouble of the database itself leaves as ours; what statements did wrong stays SQLAlchemy's."""
    if isinstance(context.sqlalchemy_exception, OperationalError | InterfaceError):
        why = str(context.original_exception).strip().splitlines()[0]
        raise StorageError(
            f"{_name(context.engine)}: {why}; nothing was written: see that the database runs, has room and may be "
            "written, then try again"
        ) from context.original_exception


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # Python's driver begins transactions by itself, but not before it creates or drops tables: half a migration would
    # stay after a crash. It is told not to, and every transaction is begun below.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "foreign_keys=ON",
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
        "synchronous=FULL",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    _turn_to_wal(cursor)
    cursor.close()


def _turn_to_wal(cursor: Any) -> None:
    """Two processes that open a new file at once collide here; SQLite's own busy timeout does not cover this."""
    until = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def ensure_schema(engine: Engine) -> None:
    """Create the schema in an empty database; refuse one that is not at this package's version.

    Raises:
        SchemaError: names the command that mends it.
    """
    try:
        with engine.connect() as connection:
            tables = set(inspect(connection).get_table_names())
            found = _current(connection)
    except DatabaseError as error:
        raise SchemaError(f"{_name(engine)} is not a database that can be read: {error.orig}") from error
    if not tables:
        upgrade_schema(engine)
    elif found is None:
        raise SchemaError(f"{_name(engine)} holds tables of something else ({', '.join(sorted(tables)[:3])})")
    elif found != head():
        _refuse(engine, found)


def upgrade_schema(engine: Engine) -> str:
    """Bring the schema to ``head`` and return that version; nothing happens where it is there already."""
    from alembic import command
    from filelock import FileLock

    config = _config()
    with engine.connect() as connection:
        found = _current(connection)
    if found is not None and found not in _known():
        _refuse(engine, found)
    file = sqlite_file(engine.url)
    if file is None:
        _run(engine, config, command.upgrade)
    else:
        # Two processes that open a new file at once create it once.
        with FileLock(f"{file}.lock"):
            _run(engine, config, command.upgrade)
    return head()


def current_version(engine: Engine) -> str | None:
    """The database's schema version, None where it has none yet."""
    with engine.connect() as connection:
        return _current(connection)


def head() -> str:
    """The schema version that this package speaks."""
    from alembic.script import ScriptDirectory

    version = ScriptDirectory.from_config(_config()).get_current_head()
    assert version is not None
    return version


def migrations_folder() -> Path:
    """Where the migrations are: inside the package when installed from a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise SchemaError(f"the migrations are missing beside {package}; reinstall lora-hub-sdk")


def _run(engine: Engine, config: Config, action: Any) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"select pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        action(config, "head")


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    return config


def _current(connection: Connection) -> str | None:
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def _known() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _refuse(engine: Engine, found: str) -> None:
    if found in _known():
        raise SchemaError(
            f"{_name(engine)} has schema {found}, this package speaks {head()}; run: "
            f"lora-hub db upgrade --database {_name(engine)}"
        )
    raise SchemaError(
        f"{_name(engine)} has schema {found}, which this package ({head()}) does not know; "
        "it was written by a newer version: pip install --upgrade lora-hub-sdk"
    )


def _name(engine: Engine | None) -> str:
    if engine is None:
        return "the database"
    return str(sqlite_file(engine.url) or engine.url.render_as_string(hide_password=True))
