"""Holding one row's answer to a grammar: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.chat.schema import WHITE_SPACE, held_schema
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Tool
from lora_hub_sdk.types import Constraint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

#: Compiled grammars that an engine keeps.
_KEPT: Final = 32
#: Of one row's lexer, 1 to 2 kB each: schemas may be strangers'. One step takes at most about 20 ms by other limits.
_LEXER_STATES: Final = 20_000
_WHAT: Final = {"json": "JSON", "json_schema": "this JSON schema", "regex": "this expression", "lark": "this grammar"}


class Guide:
    """Where one answer is in its grammar. Of one row alone."""

    def __init__(self, matcher: Any, eos_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allows(self, token: int) -> bool:
        """Whether this token may come next; much quicker than ``allowed``.

        It is true of a few tokens that ``allowed`` leaves out: where the text that follows is certain, that has it
        spelled in one way alone.
        """
        if token in self._eos_ids:
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.validate_tokens([token]))

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Which of the first ``size`` tokens may come next.

        Raises:
            ConfigurationError: the grammar became too complex on the way.
        """
        import numpy as np

        bits = self._matcher.compute_bitmask()
        self._check()
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=size, bitorder="little").astype(np.bool_)
        ends = bool(self._matcher.is_accepting())
        for token in self._eos_ids:
            if token < size:
                mask[token] = ends
        if not mask.any():
            raise ConfigurationError(
                "the answer cannot go on: of the tokens that its grammar allows, this model has none; ask for another "
                "format"
            )
        return mask

    def take(self, token: int) -> None:
        """Go on by a token that is allowed and no end.

        Raises:
            ConfigurationError: the grammar became too complex on the way.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigurationError(
                f"the answer cannot be held to its grammar any further: {_first_lines(self._matcher.get_error())}; "
                "ask for a simpler format"
            )


class Constraints:
    """Compiles grammars for one tokenizer, each once. Safe to share between threads.

    Args:
        tokenizing: held while the tokenizer is read, which is not safe to share.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int], tokenizing: threading.RLock
    ) -> None:
        self._tokenizer, self._eos_ids, self._tokenizing = tokenizer, eos_ids, tokenizing
        self._own: Any = None
        self._compiled = lru_cache(_KEPT)(self._compile)

    def start(self, constraint: Constraint, tools: Sequence[Tool] = ()) -> Callable[[], Guide]:
        """What makes a new guide, at the beginning of an answer.

        Takes a second for the first constraint of all, and up to about as long for a large new one.

        Args:
            tools: those whose schemas are in the constraint, to tell which of them is at fault.

        Raises:
            ConfigurationError: it cannot be compiled, or is too complex, or the tokenizer is none that can be used.
        """
        try:
            compiled = self._compiled(constraint)
        except ConfigurationError:
            for tool in tools:
                try:
                    self._compiled(Constraint("json_schema", held_schema(json.loads(tool.parameters), of_call=True)))
                except ConfigurationError as error:
                    raise ConfigurationError(f"the parameters of tool {tool.name!r}: {error}") from None
            raise
        return lambda: Guide(compiled.deep_copy(), self._eos_ids)

    def special(self, markers: Sequence[str]) -> dict[str, int]:
        """The ids of those of some texts that are special tokens, which grammars have to name by id.

        Raises:
            ConfigurationError: the tokenizer is none that can be used.
        """
        with self._tokenizing:
            own, known = self._own_tokenizer(), self._tokenizer.get_added_vocab()
        return {text: known[text] for text in markers if text in known and own.is_special_token(known[text])}

    def _compile(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        if constraint.kind not in _WHAT:
            raise ConfigurationError(f"constraint {constraint.kind!r} is unknown; use one of {', '.join(_WHAT)}")
        try:
            grammar = _grammar(constraint)
        except ConfigurationError:
            raise
        except ValueError as error:  # too deep, or half a character
            raise ConfigurationError(f"an answer cannot be held to {_WHAT[constraint.kind]}: {error}") from None
        with self._tokenizing:
            own = self._own_tokenizer()
        limits = LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(own, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # its copies begin with what is found here
        if matcher.is_error():
            raise ConfigurationError(
                f"an answer cannot be held to {_WHAT[constraint.kind]}: {_first_lines(matcher.get_error())}"
            )
        return matcher

    def _own_tokenizer(self) -> Any:
        if self._own is None:
            from llguidance.hf import from_tokenizer

            tokenizer: Any = self._tokenizer
            try:
                self._own = from_tokenizer(tokenizer, eos_token=sorted(self._eos_ids) or None)
            except Exception as error:
                raise ConfigurationError(
                    f"answers of this base model cannot be held to a format: its tokenizer cannot be used for it "
                    f"({type(error).__name__}: {str(error)[:200]}); ask without tools and without a format"
                ) from error
        return self._own


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(constraint.text)
    text = constraint.text if constraint.kind == "json_schema" else held_schema({"type": "object"})
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"the JSON schema is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ConfigurationError(f"the JSON schema is {text[:80]!r}; expected an object")
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITE_SPACE})


def _first_lines(error: str) -> str:
    """One line of what llguidance says."""
    return " ".join(error.split())[:300]
