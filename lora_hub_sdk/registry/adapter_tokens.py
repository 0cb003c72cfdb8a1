"""What an adapter's folder says of its own tokenizer: added tokens that its base's has not, and a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lora_hub_sdk.errors import InvalidConfigError, OutOfBoundsError, UnsupportedFeatureError
from lora_hub_sdk.registry.adapter_config import read_regular

TOKENIZER_FILE: Final = "tokenizer_config.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
#: Bytes of one of these files; the largest in use have a megabyte.
LARGEST: Final = 4 << 20
VOCABULARY_FILE: Final = "tokenizer.json"
_LONGEST_ID: Final = 9


def check_tokens(folder: Path, base_folder: Callable[[], Path], source: str) -> None:
    """Refuse an adapter whose tokenizer has tokens that its base's has not: it would get others than it learned on.

    A token for padding is let through, as nothing looks at it. What the base's folder does not tell goes unchecked.

    Args:
        base_folder: gives the base's folder; asked only where the adapter has added tokens.

    Raises:
        UnsupportedFeatureError: added tokens.
        InvalidConfigError: a file that cannot be read.
        OutOfBoundsError: a file that is too large.
    """
    raw = _object(folder / TOKENIZER_FILE, source)
    padding = _content(raw.get("pad_token"))
    added = {place: content for place, content in _added(raw) if content != padding}
    if not added:
        return
    base = base_folder()
    known = dict(_added(_object(base / TOKENIZER_FILE, str(base))))
    unknown = {place: content for place, content in added.items() if known.get(place) != content}
    if unknown and (base / VOCABULARY_FILE).is_file():  # tens of megabytes
        known = _vocabulary(base)
        unknown = {place: content for place, content in unknown.items() if known.get(place) != content}
    elif not known:
        rows = _rows(base)
        unknown = {place: content for place, content in unknown.items() if rows is not None and place >= rows}
    if unknown:
        shown = ", ".join(f"{content!r} ({place})" for place, content in sorted(unknown.items())[:5])
        raise UnsupportedFeatureError(source, "added tokens", shown + (", ..." if len(unknown) > 5 else ""))


def own_template(folder: Path, source: str) -> str | None:
    """The chat template in an adapter's folder, text that nobody has checked; None where there is none.

    Raises:
        InvalidConfigError: a file that cannot be read.
        OutOfBoundsError: a file that is too large.
    """
    text = _text(folder / TEMPLATE_FILE, source)
    if text is not None:
        return text
    found = _object(folder / TOKENIZER_FILE, source).get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((one.get("template") for one in found if _is_default(one)), None)
    return found if isinstance(found, str) else None


def _is_default(template: object) -> bool:
    return isinstance(template, Mapping) and template.get("name") == "default"


def _rows(base: Path) -> int | None:
    """How many tokens the base's embedding has room for."""
    config = _object(base / "config.json", str(base))
    rows = (config.get("text_config") or config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _vocabulary(base: Path) -> dict[int, str]:
    """The base's tokens by id."""
    tokenizer = _object(base / VOCABULARY_FILE, str(base), largest=1 << 30)
    tokens = (tokenizer.get("model") or {}).get("vocab") or {}
    # By token, or pairs of a token and its score.
    known = {place: content for content, place in tokens.items()} if isinstance(tokens, dict) else {}
    if isinstance(tokens, list):
        known = {place: pair[0] for place, pair in enumerate(tokens)}
    return known | {one["id"]: one["content"] for one in tokenizer.get("added_tokens") or ()}


def _added(raw: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    entries = raw.get("added_tokens_decoder")
    for place, entry in entries.items() if isinstance(entries, Mapping) else ():
        content = _content(entry)
        if content is not None and place.isdecimal() and len(place) <= _LONGEST_ID:
            yield int(place), content


def _content(token: object) -> str | None:
    """A token's text, which stands alone or with its properties."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _object(path: Path, source: str, *, largest: int = LARGEST) -> dict[str, Any]:
    text = _text(path, source, largest=largest)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidConfigError(source, f"{path.name} is no JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise InvalidConfigError(source, f"{path.name} holds no JSON object")
    return found


def _text(path: Path, source: str, *, largest: int = LARGEST) -> str | None:
    try:
        content = read_regular(path, largest + 1)
        if len(content) > largest:
            raise OutOfBoundsError(source, f"the size of {path.name} in bytes", path.stat().st_size, largest)
        return content.decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(source, f"{path.name} cannot be read ({error})") from error
