"""Rows of prompts and answers as tokens, for losses of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lora_hub_sdk.engine._gate_forward import GateBatch
from lora_hub_sdk.engine.prompt import PromptEncoder
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import BaseModel
    from lora_hub_sdk.engine.prompt import Template


class Answered(Protocol):
    """A row; ``finished`` tells whether the answer ends with its text."""

    @property
    def inputs(self) -> str: ...
    @property
    def targets(self) -> str: ...
    @property
    def finished(self) -> bool: ...


class Reading(Protocol):
    """How rows are read: see ``Recipe``."""

    @property
    def template(self) -> Template: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def answer_tokens(self) -> int: ...


class Encoded:
    """The rows' tokens, made when a row is first asked for.

    Raises:
        ConfigurationError: the base's context is too short for such answers.
    """

    def __init__(self, reading: Reading, base: BaseModel, rows: Sequence[Answered]) -> None:
        self._base, self._rows = base, rows
        self._prompts = PromptEncoder(base.tokenizer, reading.template)
        self._room = min(reading.max_tokens, base.context - reading.answer_tokens - 1)
        self._most = reading.answer_tokens
        if self._room < 1:
            raise ConfigurationError(f"answer_tokens={self._most} leaves no room in a context of {base.context} tokens")
        end = base.tokenizer.eos_token_id
        self._end = [end] if end in base.eos_ids else sorted(base.eos_ids)[:1]
        self._tokens: dict[int, tuple[Sequence[int], Sequence[int]]] = {}

    def size(self, number: int) -> int:
        """How many tokens a row has, prompt and answer."""
        return sum(map(len, self._of(number)))

    def batch(self, numbers: Sequence[int]) -> GateBatch:
        return GateBatch.of([self._of(number) for number in numbers], self._base.pad_id, self._base.device)

    def _of(self, number: int) -> tuple[Sequence[int], Sequence[int]]:
        if number not in self._tokens:
            self._tokens[number] = self._encode(self._rows[number], number)
        return self._tokens[number]

    def _encode(self, row: Answered, number: int) -> tuple[Sequence[int], Sequence[int]]:
        tokenizer: Any = self._base.tokenizer
        prompt = self._prompts.encode(row.inputs, limit=self._room, row=number).ids
        answer = list(tokenizer(row.targets, add_special_tokens=False)["input_ids"])
        # An adapter whose answer is empty ends at once, which is an answer too.
        whole = answer + self._end if row.finished or not answer else answer
        return prompt, whole[: self._most]
