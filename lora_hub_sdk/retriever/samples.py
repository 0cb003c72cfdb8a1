"""What a caller may give as samples, brought to one form: a tuple of texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from lora_hub_sdk.errors import ConfigurationError, SamplesError

Sample = str | Mapping[str, Any]
#: What a file or a stream of samples may hold, in bytes and in characters.
_MAX_SIZE: Final = 64 << 20


def sample_texts(
    samples: Iterable[Sample] | os.PathLike[str],
    source: str,
    *,
    redact: Callable[[str], str] | None = None,
) -> tuple[str, ...]:
    """The inputs of the samples, in order, without blank ones and repetitions.

    Texts that differ in case or white space only are one; the first spelling stays. NUL characters and lone surrogates,
    which neither UTF-8 nor PostgreSQL can hold, become U+FFFD.

    Args:
        samples: texts, or rows with an ``inputs`` field (answers are not embedded: a prompt has none), or the path of a
            file of these, as ``read_samples`` takes it.
        redact: takes a text before anything else sees it and gives it back without what must not be stored.

    Raises:
        SamplesError: a sample of another form, ``redact`` failed, or no text at all; never quotes a sample.
        ConfigurationError: the file cannot be read.
    """
    if isinstance(samples, str | bytes | Mapping):
        raise SamplesError(
            source,
            "samples is a single value, expected a list of prompts that the adapter is good at, or a pathlib.Path",
        )
    given = read_samples(samples) if isinstance(samples, os.PathLike) else samples
    kept: dict[str, str] = {}
    count = 0
    for place, sample in enumerate(given):
        count += 1
        text = _text(sample, place, source)
        text = storable(text if redact is None else _redacted(redact, text, place, source)).strip()
        if text:
            kept.setdefault(folded(text), text)
    if not kept:
        raise SamplesError(source, f"{count} samples were given, none with any text; a dozen prompts do well")
    return tuple(kept.values())


def read_samples(source: str | os.PathLike[str] | TextIO) -> list[Sample]:
    """The samples of a file or a stream: JSON lines, each a text or an object; a .txt file has one sample a line.

    Raises:
        ConfigurationError: it cannot be read, is larger than 64 MiB, or a line is not what it should be; tells the
            line's number, never its content.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "stream"))
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, encoding="utf-8-sig") as stream:
                text = stream.read(_MAX_SIZE + 1)
        else:
            text = source.read(_MAX_SIZE + 1)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"samples {name!r} cannot be read: {error}") from error
    if len(text) > _MAX_SIZE:
        raise ConfigurationError(f"samples {name!r} hold more than {_MAX_SIZE} characters; a dozen prompts do well")
    if Path(name).suffix.lower() == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    # Not splitlines: JSON may hold U+2028 and the like as they are.
    return list(_json_lines(text.split("\n"), name))


def folded(text: str) -> str:
    """What is the same for texts that differ in case or white space only."""
    return " ".join(text.casefold().split())


def storable(text: str) -> str:
    """The text without NUL and lone surrogates; a pair of surrogates becomes the character it means."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "\ufffd")


def _json_lines(lines: list[str], name: str) -> Iterator[Sample]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise ConfigurationError(f"samples {name!r}, line {number} is no JSON: {told}") from None
        if not isinstance(value, str | dict):
            raise ConfigurationError(
                f'samples {name!r}, line {number}: expected a text or an object with "inputs", '
                f"found a {type(value).__name__}"
            )
        yield value


def _text(sample: object, place: int, source: str) -> str:
    text = sample.get("inputs") if isinstance(sample, Mapping) else sample
    if not isinstance(text, str):
        found = "a row without one" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
        raise SamplesError(source, f"sample {place} is {found}, expected a text or a row with an 'inputs' text")
    return text


def _redacted(redact: Callable[[str], str], text: str, place: int, source: str) -> str:
    failure = ""
    try:
        result: object = redact(text)
    except Exception as error:
        failure = f"raised {type(error).__name__}"
    else:
        if isinstance(result, str):
            return result
        failure = f"returned a {type(result).__name__}, expected a str"
    # Outside of the handler: what redact raised may quote the sample, and would be shown as this error's context.
    raise SamplesError(source, f"redact {failure} on sample {place}; nothing was kept")
