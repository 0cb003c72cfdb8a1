"""What a caller may give as samples, brought to one form: a tuple of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_hub_sdk.errors import SamplesError


def sample_texts(samples: Iterable[str | Mapping[str, Any]], source: str) -> tuple[str, ...]:
    """The inputs of the samples, in order, without blank ones and repetitions.

    Args:
        samples: texts, or rows with an ``inputs`` field (answers are not embedded: a prompt has none).

    Raises:
        SamplesError: a sample of another form, or no text at all.
    """
    if isinstance(samples, str | Mapping):
        raise SamplesError(source, "samples is a single value, expected a list of prompts that the adapter is good at")
    texts = [_text(sample, place, source).strip() for place, sample in enumerate(samples)]
    kept = tuple(dict.fromkeys(text for text in texts if text))
    if not kept:
        raise SamplesError(source, f"{len(texts)} samples were given, none with any text; a dozen prompts do well")
    return kept


def _text(sample: object, place: int, source: str) -> str:
    text = sample.get("inputs") if isinstance(sample, Mapping) else sample
    if not isinstance(text, str):
        raise SamplesError(
            source, f"sample {place} is {str(sample)[:80]!r}, expected a text or a row with an 'inputs' text"
        )
    return text
