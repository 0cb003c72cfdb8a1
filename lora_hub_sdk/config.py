"""The one reader of the environment."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """The user's cache folder of this package: ``LORA_HUB_HOME``, else the platform's own place for caches."""
    configured = os.environ.get("LORA_HUB_HOME")
    if configured:
        return Path(configured).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("lora_hub_sdk")


def default_database() -> str:
    """What the command line opens without ``--database``: ``LORA_HUB_DATABASE``, else ``hub.db`` right here."""
    return os.environ.get("LORA_HUB_DATABASE", "hub.db")


def default_index() -> str | None:
    """The vector index of the command line: ``LORA_HUB_INDEX``; None, which is one beside the database, where unset."""
    return os.environ.get("LORA_HUB_INDEX") or None
