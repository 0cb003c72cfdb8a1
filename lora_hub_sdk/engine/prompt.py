"""From a prompt's text to token ids: templates, and cutting what is too long so that its end survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_hub_sdk.errors import ConfigurationError, PromptTooLongError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: "auto": the tokenizer's chat template where it has one, else the text as it is. None: the text as it is.
#: "adapter": the chat template that the route's first adapter brings, a stranger's program that runs in transformers'
#: sandbox; as "auto" where it brings none.
Template = Literal["auto", "chat", "alpaca", "adapter"] | Callable[[str], str] | None
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

    Args:
        own: the adapter's chat template, used with "adapter" alone.
        rows: how many tokens the model knows.

    Raises:
        ConfigurationError: an unknown template, or "chat" for a tokenizer without a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "auto",
        *,
        own: str | None = None,
        rows: int | None = None,
    ) -> None:
        has_chat = bool(tokenizer.chat_template)
        if template == "chat" and not has_chat:
            raise ConfigurationError("template='chat' was asked for, but this tokenizer has no chat template")
        if not (template in ("auto", "chat", "alpaca", "adapter", None) or callable(template)):
            raise ConfigurationError(
                f"template={template!r} is unknown; use 'auto', 'chat', 'alpaca', 'adapter', None or a function of the "
                "text"
            )
        self._tokenizer: Any = tokenizer
        self._own, self._rows = own if template == "adapter" else None, rows
        if template in ("auto", "adapter"):
            template = "chat" if has_chat or self._own is not None else None
        self._template: Template = template

    def encode(self, text: str, *, limit: int, overflow: Overflow = "cut", row: int = 0) -> EncodedPrompt:
        """Token ids of at most ``limit``.

        Only the prompt's own text is cut, from its front and on a token's edge: the template around it stays whole, so
        the marker where the answer begins is never lost.

        Raises:
            PromptTooLongError: with ``overflow="refuse"``, or when the template alone does not fit.
            ConfigurationError: a token that the model does not know, or an adapter's template that fails.
        """
        ids = self._render(text)
        self._check(ids)
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
            # The template writes its own special tokens; adding a second bos would change the answers.
            return list(self._tokenizer(self._in_chat(text), add_special_tokens=False)["input_ids"])
        if self._template == "alpaca":
            text = _ALPACA.format(text=text)
        elif callable(self._template):
            text = self._template(text)
        return self._without_doubles(list(self._tokenizer(text)["input_ids"]), text)

    def _in_chat(self, text: str) -> str:
        chat = [{"role": "user", "content": text}]
        apply = partial(self._tokenizer.apply_chat_template, chat, tokenize=False, add_generation_prompt=True)
        if self._own is None:
            return str(apply())
        try:
            return str(apply(chat_template=self._own))
        except Exception as error:  # a stranger's program, which may do anything but harm
            raise ConfigurationError(
                f"the adapter's own chat template fails ({type(error).__name__}: {str(error)[:200]}); use another one"
            ) from error

    def _without_doubles(self, ids: list[int], text: str) -> list[int]:
        """Without a second bos where the text has its own, and without an end mark, after which there is no answer."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        if eos is not None and eos != bos and ids[-1:] == [eos] and not text.endswith(self._tokenizer.eos_token):
            del ids[-1]
        return ids

    def _check(self, ids: list[int]) -> None:
        if self._rows is not None and ids and max(ids) >= self._rows:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise ConfigurationError(
                f"the prompt has token {token!r} ({max(ids)}), and the model knows {self._rows} tokens: its folder "
                "holds another model's tokenizer"
            )

    def _token_starts(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]
