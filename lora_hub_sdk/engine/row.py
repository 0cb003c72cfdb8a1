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
        self._text = _GrowingText(base)
        self._longest_stop = max(map(len, sampling.stop), default=0)
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
        before = len(self._text.settled)
        text = self._text.of(self.tokens)
        place = find_stop(text, self._sampling.stop, max(before - self._longest_stop, 0))
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


class _GrowingText:
    """The text of tokens that come one by one, decoding only the last of them anew.

    The last settled tokens are decoded along with new ones, as a tokenizer may write a token otherwise at the beginning
    of a text than within it; what they gave by themselves is left out. Half a character settles with its other half.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._context = self._read = self._overlap = 0
        self.settled = ""

    def of(self, tokens: list[int]) -> str:
        """The text of all ``tokens``, which begin with those of the last call."""
        tail = self._decode(tokens[self._context :])
        text = self.settled + tail[self._overlap :]
        if not tail.endswith("\N{REPLACEMENT CHARACTER}"):
            self.settled = text
            self._context, self._read = self._read, len(tokens)
            self._overlap = len(self._decode(tokens[self._context : self._read]))
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(self._base.tokenizer.decode(tokens, skip_special_tokens=True))
