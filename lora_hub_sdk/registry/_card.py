"""What a model card says about an adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Card:
    """The fields of a card's YAML header that the registry keeps."""

    license: str | None
    description: str | None
    tags: tuple[str, ...]


def read_card(file: Path) -> Card:
    """Read a README.md; everything is empty where there is none, or none that can be read."""
    header = _header(file) if file.is_file() else {}
    return Card(_text(header.get("license")), _text(header.get("description")), _texts(header.get("tags")))


def _header(file: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    # A stranger's text goes through several parsers: no way to be wrong may cost the adapter.
    try:
        card = ModelCard(file.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True)
        return dict(card.data.__dict__)
    except Exception as error:
        _log.info("the header of %s cannot be read: %s", file, error)
        return {}


def _text(value: object) -> str | None:
    """One text; a card may also list several licences."""
    return ", ".join(_texts(value)) or None


def _texts(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(text for item in values if isinstance(item, str) and (text := item.strip()))
