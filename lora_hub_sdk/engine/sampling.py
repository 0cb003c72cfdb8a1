"""The next token of one row, and where its text stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.engine.constraint import Guide


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings that make no sense, before any work is done.

    Raises:
        ConfigurationError: names the field, its value and its range.
    """
    for name, good, expected in (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "1 or more"),
        ("temperature", sampling.temperature >= 0.0, "0 (greedy) or more"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("stop", all(sampling.stop), "strings that are not empty"),
    ):
        if not good:
            raise ConfigurationError(f"{name}={getattr(sampling, name)!r}: expected {expected}")


class TokenSampler:
    """Chooses tokens for one row. Its random numbers are its own, so neighbours in a batch never change them."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature == 0.0
        if self._greedy:
            return
        import torch
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        warpers: list[object] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warp: Any = LogitsProcessorList(warpers)

    def choose(self, logits: Tensor, greedy_token: int, guide: Guide | None = None) -> int:
        """The next token from logits of shape (vocabulary,); ``greedy_token`` is their argmax, known for all rows.

        Args:
            guide: chooses among the tokens that it allows.

        Raises:
            ConfigurationError: the guide cannot go on.
        """
        if self._greedy and (guide is None or guide.allows(greedy_token)):
            return greedy_token
        import torch

        logits = logits.float().cpu()
        if guide is not None:
            allowed = torch.from_numpy(guide.allowed(len(logits)))
            logits = logits.masked_fill(~allowed, -torch.inf)
        if self._greedy:
            return int(logits.numpy().argmax())
        # The warpers take the ids so far and do not use them.
        scores: Tensor = self._warp(torch.empty(1, 0, dtype=torch.long), logits[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def find_stop(text: str, stop: tuple[str, ...], start: int = 0) -> int | None:
    """Where the first stop string at or after ``start`` begins, or None."""
    places = [place for place in (text.find(mark, start) for mark in stop) if place >= 0]
    return min(places, default=None)


def safe_length(text: str, stop: tuple[str, ...]) -> int:
    """How much of an unfinished text can be shown: not a half character, not what may become a stop string."""
    end = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    held = [size for mark in stop for size in range(1, len(mark)) if text[:end].endswith(mark[:size])]
    return end - max(held, default=0)
