"""The decoding loop: one left-padded batch from its prompts to its texts.

Written out rather than left to ``generate``, because rows of one batch have their own sampling, seeds, stop strings and
end, and rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, Protocol

from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.sampling import TokenSampler, find_stop, safe_length
from lora_hub_sdk.types import FinishReason, Sampling

if TYPE_CHECKING:
    from torch import Tensor

#: Rows that have ended are taken out once they are this share of the batch: taking them out copies the cache.
_COMPACT_AT: Final = 0.25


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one row came to."""

    text: str
    tokens: int
    finish_reason: FinishReason


class Row:
    """One row while it is being decoded: its tokens so far, its text so far, whether it has ended."""

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
        self._tokens: list[int] = []
        self._shown = 0
        self.done: Decoded | None = None

    def step(self, logits: Tensor, greedy_token: int) -> int:
        """Choose and take the next token; returns it."""
        token = self._sampler.choose(logits, greedy_token)
        self._tokens.append(token)
        if token in self._base.eos_ids:
            self._finish(self._decode(self._tokens[:-1]), "stop")
        elif not self._stopped() and len(self._tokens) == self._sampling.max_new_tokens:
            self._finish(self._decode(self._tokens), "length")
        return token

    def _stopped(self) -> bool:
        """Whether a stop string has come; shows what is safe to show on the way."""
        if not self._sampling.stop and self._on_text is None:
            return False
        text = self._decode(self._tokens)
        place = find_stop(text, self._sampling.stop)
        if place is not None:
            self._finish(text[:place], "stop")
            return True
        self._show(text[: safe_length(text, self._sampling.stop)])
        return False

    def _finish(self, text: str, reason: FinishReason) -> None:
        self._show(text)
        self.done = Decoded(text, len(self._tokens), reason)

    def _show(self, text: str) -> None:
        if self._on_text is not None and len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._base.tokenizer.decode(tokens, skip_special_tokens=True))


class Layers(Protocol):
    """Whatever adds something of its own to each row; see ``LoraLayers``."""

    def start_decoding(self) -> None:
        """From here on every row is one token long."""

    def narrow(self, keep: Tensor) -> None:
        """Only the rows at these indices go on."""


def decode(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    *,
    layers: Layers,
) -> None:
    """Run all rows to their end, which each of them then holds in ``done``.

    Args:
        prompts: token ids, of any lengths of 1 or more.
        layers: told when decoding starts, and the indices of the rows that stay whenever others are taken out.
    """
    import torch

    with torch.inference_mode():
        state = RunningBatch(base, prompts, max(row._sampling.max_new_tokens for row in rows))
        alive = list(rows)
        logits = state.prefill()
        layers.start_decoding()
        while True:
            # One transfer for all rows; a row that samples looks at its logits itself.
            greedy = logits.argmax(-1).tolist()
            tokens = [
                base.pad_id if row.done else row.step(logits[place], greedy[place]) for place, row in enumerate(alive)
            ]
            keep = [place for place, row in enumerate(alive) if not row.done]
            if not keep:
                return
            if len(alive) - len(keep) >= _COMPACT_AT * len(alive):
                index = torch.tensor(keep, device=base.device)
                state.keep(index)
                layers.narrow(index)
                alive, tokens = [alive[place] for place in keep], [tokens[place] for place in keep]
            logits = state.step(tokens)


class RunningBatch:
    """The tensors of a running batch: left-padded ids, mask, positions, and the key-value cache."""

    def __init__(self, base: BaseModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        import torch
        from transformers import DynamicCache

        width = max(map(len, prompts))
        padded = [[base.pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
        lengths = torch.tensor([len(ids) for ids in prompts], device=base.device)
        self._ids = torch.tensor(padded, device=base.device)
        places = torch.arange(width + max_new_tokens, device=base.device)
        self._mask = (places >= (width - lengths)[:, None]).long()
        self._filled = width
        self._next = lengths[:, None]
        model: Any = base.model
        self._cache = DynamicCache(config=model.config)
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self._forward = partial(model, past_key_values=self._cache, use_cache=True, **last_only)

    def prefill(self) -> Tensor:
        """Logits (b, vocabulary) after each prompt's last token. Positions count real tokens only."""
        mask = self._mask[:, : self._filled]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self._logits(self._ids, mask, positions)

    def step(self, tokens: list[int]) -> Tensor:
        """Logits (b, vocabulary) after one more token in each row."""
        import torch

        ids = torch.tensor(tokens, device=self._ids.device)[:, None]
        self._filled += 1
        logits = self._logits(ids, self._mask[:, : self._filled], self._next)
        self._next = self._next + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._mask, self._next = self._mask[rows], self._next[rows]
        self._cache.batch_select_indices(rows)

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self._forward(input_ids=ids, attention_mask=mask, position_ids=positions)
        logits: Tensor = output.logits[:, -1].float()
        return logits
