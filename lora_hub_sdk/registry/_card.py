"""What a model card says about an adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_log = logging.getLogger(__name__)

#: No honest card is larger; what lies behind is not read.
_MAX_BYTES: Final = 1 << 18
_MAX_LISTED: Final = 100
_SUMMARY_CHARACTERS: Final = 1000
#: What templates leave in a card that nobody filled in, and what is no prose: comments, code, tables, images, headings.
_NO_PROSE: Final = re.compile(
    r"<!--.*?(?:-->|\Z)|```.*?(?:```|\Z)|^[ \t]*[|#].*?$|!\[[^\]]{0,300}\]\([^)]{0,1000}\)|<[^>]{1,200}>"
    r"|\[More Information Needed\]",
    re.DOTALL | re.MULTILINE,
)
_HEADER: Final = re.compile(r"\A\s*---\s*\n.*?\n---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Card:
    """The fields of a card's YAML header that the registry keeps, and the first prose below it.

    ``summary`` is the first paragraph that is neither a heading nor a template's filler, cut to 1000 characters.
    ``widget`` holds the examples as they stand in the header; ``datasets`` the ids it names.
    """

    license: str | None
    description: str | None
    tags: tuple[str, ...]
    summary: str | None = None
    widget: tuple[object, ...] = ()
    datasets: tuple[str, ...] = ()


def read_card(file: Path) -> Card:
    """Read a README.md; everything is empty where there is none, or none that can be read."""
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return Card(None, None, ())
    header = _header(text, file)
    return Card(
        license=_text(header.get("license")),
        description=_text(header.get("description")),
        tags=_texts(header.get("tags")),
        summary=_summary(text),
        widget=tuple(_listed(header.get("widget"))),
        datasets=_texts(header.get("datasets")),
    )


def _header(text: str, file: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    # A stranger's text goes through several parsers: no way to be wrong may cost the adapter.
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.__dict__)
    except Exception as error:
        _log.info("the header of %s cannot be read: %s", file, error)
        return {}


def _summary(text: str) -> str | None:
    body = _NO_PROSE.sub("", _HEADER.sub("", text.replace("\r\n", "\n"), count=1))
    # Cut before anything is searched in them: a stranger's paragraph may be all there is.
    paragraphs = (" ".join(paragraph.split())[:_SUMMARY_CHARACTERS] for paragraph in re.split(r"\n\s*\n", body))
    return next((paragraph for paragraph in paragraphs if re.search(r"\w{2}.*\s.*\w{2}", paragraph)), None)


def _text(value: object) -> str | None:
    """One text; a card may also list several licences."""
    return ", ".join(_texts(value)) or None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(text for item in _listed(value) if isinstance(item, str) and (text := item.strip()))


def _listed(value: object) -> list[object]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in values[:_MAX_LISTED] if item is not None]
