"""One row while it is being decoded: its tokens so far, its text so far, whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.sampling import TokenSampler, find_stop, safe_length
from lora_hub_sdk.messages import InvalidToolCall, Piece, ToolCall
from lora_hub_sdk.types import FinishReason, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.chat.reply import ReplyReader
    from lora_hub_sdk.engine.constraint import Guide

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one row came to."""

    text: str
    tokens: int
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


class Row:
    """See the module. ``tokens`` are those generated so far.

    Args:
        on_piece: is shown what becomes final.
        guide: what its text has to be.
        reader: finds calls of tools in its text.
        decode: tokens to text; by default without all special tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        base: BaseModel,
        on_piece: Callable[[Piece], None] | None = None,
        *,
        guide: Guide | None = None,
        reader: ReplyReader | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._sampling = sampling
        self._sampler = TokenSampler(sampling)
        self._base = base
        self._on_piece = on_piece
        self._guide, self._reader = guide, reader
        tokenizer: Any = base.tokenizer
        self._decode: Decode = decode or partial(tokenizer.decode, skip_special_tokens=True)
        self._text = _GrowingText(self._decode)
        self._longest_stop = max(map(len, sampling.stop), default=0)
        self._shown = 0
        self.tokens: list[int] = []
        self.done: Decoded | None = None

    def step(self, logits: Tensor, greedy_token: int) -> int:
        """Choose and take the next token; returns it.

        Raises:
            ConfigurationError: its text cannot be held any further to what it has to be.
        """
        token = self._sampler.choose(logits, greedy_token, self._guide)
        self.tokens.append(token)
        if token in self._base.eos_ids:
            self._finish(self._decode(self.tokens[:-1]), "stop")
            return token
        if self._guide is not None:
            self._guide.take(token)
        if self._stopped():
            return token
        if self._guide is not None and self._guide.complete:
            self._finish(self._decode(self.tokens), "stop")
        elif len(self.tokens) == self._sampling.max_new_tokens:
            self._finish(self._decode(self.tokens), "length")
        return token

    def _stopped(self) -> bool:
        """Whether a stop string has come; shows what is safe to show on the way."""
        if not self._sampling.stop and self._on_piece is None:
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
        if self._reader is None:
            self.done = Decoded(text, len(self.tokens), reason)
            return
        reply = self._reader.finish()
        self._hand_on(reply.pieces)
        self.done = Decoded(reply.text, len(self.tokens), reason, reply.tool_calls, reply.invalid_tool_calls)

    def _show(self, text: str) -> None:
        new = text[self._shown :]
        if new:
            self._shown = len(text)
            self._hand_on([new] if self._reader is None else self._reader.feed(new))

    def _hand_on(self, pieces: Iterable[Piece]) -> None:
        if self._on_piece is not None:
            for piece in pieces:
                self._on_piece(piece)


class _GrowingText:
    """The text of tokens that come one by one, decoding only the last of them anew.

    The last settled tokens are decoded along with new ones, as a tokenizer may write a token otherwise at the beginning
    of a text than within it; what they gave by themselves is left out. Half a character settles with its other half.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
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
