"""From what a request asks of its answer to the row that decodes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from lora_hub_sdk.chat.formats import ToolFormat
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.constraint import Constraints, Guide
from lora_hub_sdk.engine.row import Decode, Row
from lora_hub_sdk.messages import Conversation, Piece, Prompt, Tool
from lora_hub_sdk.types import Constraint, Sampling

#: Makes a row at its beginning, which shows what becomes final where it is given a function.
NewRow = Callable[[Callable[[Piece], None] | None], Row]


def is_plain(prompt: Prompt, sampling: Sampling) -> bool:
    """Whether its row needs no grammar, so that it is made in no time."""
    return sampling.constraint is None and not (isinstance(prompt, Conversation) and prompt.callable_tools)


class RowMaker:
    """Makes one engine's rows. Safe to share between threads.

    Args:
        tokenizing: held while the tokenizer is used.
    """

    def __init__(self, base: BaseModel, tokenizing: threading.RLock) -> None:
        self._base, self._tokenizing = base, tokenizing
        self._constraints = Constraints(base.tokenizer, base.eos_ids, tokenizing)

    def prepare(self, prompt: Prompt, sampling: Sampling, form: Callable[[Conversation], ToolFormat]) -> NewRow:
        """Compile what the answer has to be.

        Args:
            form: how calls are written in a conversation with tools.

        Raises:
            ConfigurationError: the answer cannot be held to it.
        """
        if is_plain(prompt, sampling):
            return lambda on_piece: Row(sampling, self._base, on_piece)
        tools = prompt.callable_tools if isinstance(prompt, Conversation) else ()
        if not isinstance(prompt, Conversation) or not tools:
            guide = self._guide(sampling.constraint)
            return lambda on_piece: Row(sampling, self._base, on_piece, guide=guide())
        written = form(prompt)
        special = self._constraints.special(written.markers)
        held = self._guide(written.grammar(prompt, sampling.constraint, special), tools)
        decode = self._decode(written.markers)
        return lambda on_piece: Row(
            sampling, self._base, on_piece, guide=held(), reader=written.reader(tools), decode=decode
        )

    def _guide(self, constraint: Constraint | None, tools: Sequence[Tool] = ()) -> Callable[[], Guide | None]:
        return _none if constraint is None else self._constraints.start(constraint, tools)

    @cached_property
    def _special(self) -> dict[int, str]:
        """The tokens that decoding leaves out."""
        tokenizer: Any = self._base.tokenizer
        with self._tokenizing:
            found = {token: str(one) for token, one in tokenizer.added_tokens_decoder.items() if one.special}
            return found | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    def _decode(self, markers: Sequence[str]) -> Decode | None:
        """What keeps the markers that are special tokens; None where none is."""
        if not set(markers) & set(self._special.values()):
            return None
        tokenizer: Any = self._base.tokenizer
        hidden = {token for token, text in self._special.items() if text not in markers}
        return lambda tokens: str(tokenizer.decode([token for token in tokens if token not in hidden]))


def _none() -> None:
    """Nothing to hold to."""
