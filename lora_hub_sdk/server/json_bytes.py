"""Answers as JSON: plain values, no model validates them again."""

from __future__ import annotations

import json
from typing import Any, Final

_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def json_bytes(value: Any) -> bytes:
    """As compact ASCII, which every text can be written in."""
    return _ENCODER.encode(value).encode("ascii")
