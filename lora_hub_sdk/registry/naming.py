"""Which names adapters, namespaces and keys may have."""

from __future__ import annotations

from typing import Final

from lora_hub_sdk.errors import ConfigurationError

LONGEST_NAME: Final = 512
LONGEST_NAMESPACE: Final = 128


def can_be_stored(text: str) -> bool:
    """Whether every database can hold a text, or compare with it: without NUL and halves of surrogate pairs."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def check_name(what: str, text: object, longest: int) -> None:
    """Refuse names that no database and no person can tell from others.

    Raises:
        ConfigurationError: names ``what`` and the text.
    """
    if not isinstance(text, str) or not text.strip() or text != text.strip() or len(text) > longest:
        raise ConfigurationError(f"{what}={str(text)[:80]!r}: expected 1 to {longest} characters without blanks around")
    if not text.isprintable():
        raise ConfigurationError(f"{what}={text!r} holds characters that cannot be shown")
