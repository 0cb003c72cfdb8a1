"""Which vector index belongs to which place: a server, a folder, or none at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.registry.chroma_client import ChromaFolder, ChromaServer
from lora_hub_sdk.registry.chroma_index import ChromaIndex
from lora_hub_sdk.registry.exact_index import ExactIndex
from lora_hub_sdk.registry.index import VectorIndex

_log: Final = logging.getLogger(__name__)
_warned: Final[set[Path]] = set()


def open_index(place: str | Path | None, name: str) -> VectorIndex:
    """The vector index of that name in that place; nothing is read from it yet.

    Args:
        place: None or "exact" for memory; "http://host:port" of a Chroma server; else a folder. Only one process at a
            time can use a folder: any further one gets an index in memory instead, and a warning in the log.
        name: tells indexes apart that share a place.

    Raises:
        ConfigurationError: a URL or a folder that cannot be used.
    """
    if place is None or place == "exact":
        return ExactIndex()
    if isinstance(place, str) and "://" in place:
        return ChromaIndex(ChromaServer(place), name)
    if not str(place):
        raise ConfigurationError("index='': expected a folder, http://host:port of a Chroma server, or 'exact'")
    folder = Path(place)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"index={str(place)!r}: this is a file; expected a folder, or http://host:port")
    try:
        taken = ChromaFolder.take(folder)
    except (OSError, NotImplementedError) as error:
        if folder not in _warned:
            _warned.add(folder)
            why = "another process uses it" if isinstance(error, TimeoutError) else f"it cannot be locked: {error}"
            _log.warning(
                "the vector index %s is left alone, as %s; this process keeps its vectors in memory instead (several "
                "processes can share a Chroma server)",
                folder,
                why,
            )
        return ExactIndex()
    try:
        return ChromaIndex(taken, name)
    except ConfigurationError:
        taken.close()
        raise
