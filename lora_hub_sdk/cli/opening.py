"""Opening a hub for a command, and keeping libraries quiet while it works."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.hub import LoraHub

#: Loggers that tell users about things they neither caused nor can change.
_CHATTY: Final = ("huggingface_hub", "httpx", "sentence_transformers", "chromadb", "alembic", "bitsandbytes")


def open_hub(
    database: str,
    endpoint: str | None = None,
    *,
    index: str | None = None,
    offline: bool = False,
    actor: str | None = None,
    create: bool = False,
) -> LoraHub:
    """The hub of a command.

    Raises:
        ConfigurationError: the database does not exist and ``create`` does not allow making it.
    """
    from lora_hub_sdk.hub import LoraHub

    if not create:
        require_database(database)
    return LoraHub(database, index=index, endpoint=endpoint, offline=offline, actor=actor)


def open_to_look(database: str, endpoint: str | None = None, *, offline: bool = False) -> LoraHub:
    """The hub of a command that registers nothing: where there is no database, none is made."""
    return open_hub(":memory:" if _is_missing(database) else database, endpoint, offline=offline, create=True)


def require_database(database: str) -> None:
    """Refuse a SQLite file that is not there, which opening would silently make.

    Raises:
        ConfigurationError: names the file and how one comes to be.
    """
    if _is_missing(database):
        raise ConfigurationError(
            f"database {database!r} does not exist; name another with --database, or register an adapter to create it"
        )


def quiet_libraries() -> None:
    """Turn off the libraries' warnings and loading bars, before a command that loads models.

    The bars stay on while the embedded model waits for its one conversion, which without them looks like a hang.
    """
    from transformers.utils import logging as transformers_logging

    from lora_hub_sdk.models.names import SMOLLM2
    from lora_hub_sdk.models.wheel import converted_folder

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    settings: Any = transformers_logging  # its functions carry no types
    settings.set_verbosity_error()
    if converted_folder(SMOLLM2).is_dir():
        settings.disable_progress_bar()


def _is_missing(database: str) -> bool:
    from sqlalchemy.exc import ArgumentError

    from lora_hub_sdk.registry.schema import database_url, sqlite_file

    try:
        file = sqlite_file(database_url(database))
    except ArgumentError:
        return False  # opening it says what is wrong
    return file is not None and not file.is_file()
