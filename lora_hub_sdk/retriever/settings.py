"""What an encoder's folder says of how it is to be used; our trainer writes it beside the weights."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from lora_hub_sdk.errors import ConfigurationError

#: Paper section 4.1: what tells the encoder that tasks are compared, not topics.
INSTRUCTION: Final = "Represent the sentence for similar task retrieval: "
SETTINGS_FILE: Final = "lora_hub_retriever.json"
_VERSION: Final = 1
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RetrieverSettings:
    """How a retriever uses its encoder.

    ``instruction`` stands in front of every text. ``max_tokens`` bounds what is read of a text, the instruction and the
    model's own marks among them; None is as much as the model takes. Of a longer text, ``tail_tokens`` of these are its
    end, where long prompts often put their question; 0 reads the front alone. ``rerank``: whether searches rerank where
    the caller does not say. ``min_score``: the calibrated cosine in [-1, 1] below which no adapter fits; None where
    nobody calibrated.

    Raises:
        ConfigurationError: a value that makes no sense.
    """

    instruction: str = INSTRUCTION
    max_tokens: int | None = None
    tail_tokens: int = 0
    rerank: bool = False
    min_score: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.instruction, str) or _LONE_SURROGATE.search(self.instruction):
            raise ConfigurationError(f"instruction={self.instruction!r}: expected a text of whole characters, or ''")
        if self.max_tokens is not None and not (_is(self.max_tokens, int) and self.max_tokens >= 1):
            raise ConfigurationError(f"max_tokens={self.max_tokens!r}: expected a whole number of 1 or more, or None")
        tail = self.tail_tokens
        if not (_is(tail, int) and tail >= 0 and (self.max_tokens is None or tail < self.max_tokens)):
            raise ConfigurationError(f"tail_tokens={tail!r}: expected a whole number from 0 to below max_tokens")
        if not isinstance(self.rerank, bool):
            raise ConfigurationError(f"rerank={self.rerank!r}: expected True or False")
        score = self.min_score
        if score is not None and not (_is(score, int, float) and math.isfinite(score) and -1 <= score <= 1):
            raise ConfigurationError(f"min_score={score!r}: expected a cosine from -1 to 1, or None")


def settings_of(encoder: object) -> RetrieverSettings:
    """An encoder's settings; the defaults for an object that has none."""
    settings: RetrieverSettings = getattr(encoder, "settings", RetrieverSettings())
    return settings


def read_settings(folder: Path) -> RetrieverSettings:
    """The settings of an encoder's folder; the defaults where it has no such file, as every plain encoder.

    Raises:
        ConfigurationError: the file cannot be read, is damaged, or was written by another version of this package.
    """
    file = folder / SETTINGS_FILE
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return RetrieverSettings()
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"the retriever's settings {file} cannot be read: {error}; {_REMEDY}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"the retriever's settings {file} hold no JSON object; {_REMEDY}")
    version = found.pop("version", None)
    if version != _VERSION or isinstance(version, bool):
        raise ConfigurationError(
            f"the retriever's settings {file} are of version {version!r}, this package reads version {_VERSION}; "
            "use the version of lora-hub-sdk that wrote them, or train the encoder again"
        )
    if unknown := sorted(found.keys() - {field.name for field in fields(RetrieverSettings)}):
        raise ConfigurationError(
            f"the retriever's settings {file} have unknown fields: {', '.join(unknown)}; {_REMEDY}"
        )
    try:
        return RetrieverSettings(**found)
    except ConfigurationError as error:
        raise ConfigurationError(f"the retriever's settings {file}: {error}; {_REMEDY}") from error


def write_settings(folder: Path, settings: RetrieverSettings) -> None:
    """Put the settings into an encoder's folder, in place of those that it has; a reader sees the old or the new.

    Raises:
        OSError: the folder is not there or cannot be written to.
    """
    text = json.dumps({"version": _VERSION, **asdict(settings)}, indent=2, sort_keys=True, allow_nan=False)
    # Not mkstemp, whose files only their owner may read.
    temporary = folder / f".{SETTINGS_FILE}.{uuid.uuid4().hex}"
    try:
        temporary.write_text(f"{text}\n", "utf-8")
        os.replace(temporary, folder / SETTINGS_FILE)
    finally:
        temporary.unlink(missing_ok=True)


_REMEDY: Final = "write it again with write_settings, or take it away for the defaults"


def _is(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
