"""One row while it is being decoded: its tokens so far, its text so far, whether it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.sampling import TokenSampler, find_stop, safe_length
from lora_hub_sdk.types import FinishReason, Sampling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one row came to."""

    text: str
    tokens: int
    finish_reason: FinishReason


class Row:
    """See the module. ``tokens`` are those generated so far."""

    def __init__(
        self,
        sampling: Sampling,
        base: BaseModel,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self._sampling = sampling
        self._sampler = TokenSampler(sampling)
        self._base = base
        self._on_text = on_text
        self._shown = 0
        self.tokens: list[int] = []
        self.done: Decoded | None = None

    def step(self, logits: Tensor, greedy_token: int) -> int:
        """Choose and take the next token; returns it."""
        token = self._sampler.choose(logits, greedy_token)
        self.tokens.append(token)
        if token in self._base.eos_ids:
            self._finish(self._decode(self.tokens[:-1]), "stop")
        elif not self._stopped() and len(self.tokens) == self._sampling.max_new_tokens:
            self._finish(self._decode(self.tokens), "length")
        return token

    def _stopped(self) -> bool:
        """Whether a stop string has come; shows what is safe to show on the way."""
        if not self._sampling.stop and self._on_text is None:
            return False
        text = self._decode(self.tokens)
        place = find_stop(text, self._sampling.stop)
        if place is not None:
            self._finish(text[:place], "stop")
            return True
        self._show(text[: safe_length(text, self._sampling.stop)])
        return False

    def _finish(self, text: str, reason: FinishReason) -> None:
        self._show(text)
        self.done = Decoded(text, len(self.tokens), reason)

    def _show(self, text: str) -> None:
        if self._on_text is not None and len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._base.tokenizer.decode(tokens, skip_special_tokens=True))
