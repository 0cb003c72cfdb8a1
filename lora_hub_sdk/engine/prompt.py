"""From a prompt's text to token ids: templates, and cutting what is too long so that its end survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_hub_sdk.errors import ConfigurationError, PromptTooLongError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: "auto": the tokenizer's chat template where it has one, else the text as it is. None: the text as it is.
Template = Literal["auto", "chat", "alpaca"] | Callable[[str], str] | None
Overflow = Literal["cut", "refuse"]

#: The form the paper's adapters were trained on (Stanford Alpaca, without an input field).
_ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{text}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids ready for the model; ``truncated`` of the text's own tokens were cut from its front."""

    ids: tuple[int, ...]
    truncated: int = 0


class PromptEncoder:
    """Renders and tokenizes prompts for one tokenizer and template.

    Raises:
        ConfigurationError: an unknown template, or "chat" for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto") -> None:
        has_chat = bool(tokenizer.chat_template)
        if template == "chat" and not has_chat:
            raise ConfigurationError("template='chat' was asked for, but this tokenizer has no chat template")
        if not (template in ("auto", "chat", "alpaca", None) or callable(template)):
            raise ConfigurationError(
                f"template={template!r} is unknown; use 'auto', 'chat', 'alpaca', None or a function of the text"
            )
        self._tokenizer: Any = tokenizer
        self._template: Template = ("chat" if has_chat else None) if template == "auto" else template

    def encode(self, text: str, *, limit: int, overflow: Overflow = "cut", row: int = 0) -> EncodedPrompt:
        """Token ids of at most ``limit``.

        Only the prompt's own text is cut, from its front and on a token's edge: the template around it stays whole, so
        the marker where the answer begins is never lost.

        Raises:
            PromptTooLongError: with ``overflow="refuse"``, or when the template alone does not fit.
        """
        ids = self._render(text)
        if len(ids) <= limit:
            return EncodedPrompt(tuple(ids))
        if overflow == "refuse":
            raise PromptTooLongError(row, len(ids), limit, hint="shorten it, or allow cutting with overflow='cut'")
        starts = self._token_starts(text)
        dropped, excess = 0, len(ids) - limit
        while excess > 0:
            dropped += excess
            # A character may be several tokens: it goes as a whole.
            while dropped < len(starts) and starts[dropped] == starts[dropped - 1]:
                dropped += 1
            if dropped >= len(starts):
                raise PromptTooLongError(
                    row, len(ids), limit, hint="its template alone leaves no room; lower max_new_tokens"
                )
            # Tokens merge anew at the cut: one round may leave a few too many.
            ids = self._render(text[starts[dropped] :])
            excess = len(ids) - limit
        return EncodedPrompt(tuple(ids), sum(start < starts[dropped] for start in starts))

    def _render(self, text: str) -> list[int]:
        if self._template == "chat":
            rendered = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            # The template writes its own special tokens; adding a second bos would change the answers.
            return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])
        if self._template == "alpaca":
            text = _ALPACA.format(text=text)
        elif callable(self._template):
            text = self._template(text)
        return list(self._tokenizer(text)["input_ids"])

    def _token_starts(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]
