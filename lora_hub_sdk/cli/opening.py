"""Opening a hub for a command, and keeping libraries quiet while it works."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.hub import LoraHub

#: Loggers that tell users about things they neither caused nor can change.
_CHATTY: Final = ("huggingface_hub", "httpx", "sentence_transformers", "chromadb", "alembic", "bitsandbytes")


def open_hub(database: str, endpoint: str | None = None, *, create: bool = False) -> LoraHub:
    """The hub of a command.

    Raises:
        ConfigurationError: the database does not exist and ``create`` does not allow making it.
    """
    from lora_hub_sdk.hub import LoraHub

    if not create:
        require_database(database)
    return LoraHub(database, endpoint=endpoint)


def require_database(database: str) -> None:
    """Refuse a SQLite file that is not there, which opening would silently make.

    Raises:
        ConfigurationError: names the file and how one comes to be.
    """
    file = _sqlite_file(database)
    if file is not None and not file.is_file():
        raise ConfigurationError(
            f"database {database!r} does not exist; name another with --database, or register an adapter to create it"
        )


def quiet_libraries() -> None:
    """Turn off the libraries' warnings and loading bars, before a command that loads models.

    The bars stay on while the embedded model waits for its one conversion, which without them looks like a hang.
    """
    from transformers.utils import logging as transformers_logging

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    settings: Any = transformers_logging  # its functions carry no types
    settings.set_verbosity_error()
    if _is_converted():
        settings.disable_progress_bar()


def _is_converted() -> bool:
    from lora_hub_sdk.config import cache_home
    from lora_hub_sdk.models.names import SMOLLM2

    return any(folder.is_dir() for folder in (cache_home() / "models").glob(f"{SMOLLM2.name}-*-v[0-9]*"))


def _sqlite_file(database: str) -> Path | None:
    """The file behind a path or a SQLite URL; None for databases in memory and on servers."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if database == ":memory:":
        return None
    if "://" not in database:
        return Path(database)
    try:
        url = make_url(database)
    except ArgumentError:
        return None  # opening it says what is wrong
    in_memory = url.database in (None, "", ":memory:")
    return None if in_memory or url.get_backend_name() != "sqlite" else Path(str(url.database))
