"""From a prompt to token ids: templates, and cutting what is too long so that its end survives."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_hub_sdk.chat.formats import ToolFormat, format_of
from lora_hub_sdk.chat.transcript import transcript
from lora_hub_sdk.engine.conversation_prompt import ChatTemplate, shortened
from lora_hub_sdk.errors import ConfigurationError, PromptTooLongError
from lora_hub_sdk.messages import Conversation, Message, Prompt

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
    """Token ids ready for the model; ``truncated`` were cut from the front of its text or conversation."""

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
        self._rows = rows
        self._chat = ChatTemplate(tokenizer, own if template == "adapter" else None)
        if template in ("auto", "adapter"):
            template = "chat" if has_chat or self._chat.own is not None else None
        self._template: Template = template

    def encode(self, prompt: Prompt, *, limit: int, overflow: Overflow = "cut", row: int = 0) -> EncodedPrompt:
        """Token ids of at most ``limit``.

        Only the prompt's own text is cut, from its front and on a token's edge: the template around it stays whole, so
        the marker where the answer begins is never lost. A conversation loses whole turns first, see ``shortened``.

        Raises:
            PromptTooLongError: with ``overflow="refuse"``, or when the template alone does not fit.
            ConfigurationError: a token that the model does not know, or a template that fails.
        """
        ids = self._render(prompt)
        self._check(ids)
        if len(ids) <= limit:
            return EncodedPrompt(tuple(ids))
        if overflow == "refuse":
            raise PromptTooLongError(row, len(ids), limit, hint="shorten it, or allow cutting with overflow='cut'")
        if isinstance(prompt, Conversation):
            short = self._cut_conversation(prompt, limit)
            cut = None if short is None else (short, len(ids) - len(short))
        else:
            cut = self._cut(prompt, ids, self._render, limit)
        if cut is None:
            kept = "system, tools and calls leave" if isinstance(prompt, Conversation) else "template alone leaves"
            raise PromptTooLongError(row, len(ids), limit, hint=f"its {kept} no room; lower max_new_tokens")
        return EncodedPrompt(tuple(cut[0]), cut[1])

    def count(self, prompt: Prompt) -> int:
        """How many token ids the whole prompt is, all that a template adds included."""
        return len(self._render(prompt))

    def tool_format(self, conversation: Conversation) -> ToolFormat:
        """How calls are written in its answer."""
        return self._chat.format(conversation) if self._template == "chat" else format_of(None)

    def _cut(
        self, text: str, ids: list[int], render: Callable[[str], list[int]], limit: int
    ) -> tuple[list[int], int] | None:
        """The ids with the text's front cut off, and how many of its tokens are gone; None where none would stay.

        Args:
            ids: with all of the text.
        """
        starts = self._token_starts(text)
        dropped = 0
        while (excess := len(ids) - limit) > 0:
            dropped += excess
            # A character may be several tokens: it goes as a whole.
            while dropped < len(starts) and starts[dropped] == starts[dropped - 1]:
                dropped += 1
            if dropped >= len(starts):
                return None
            # Tokens merge anew at the cut: one round may leave a few too many.
            ids = render(text[starts[dropped] :])
        return ids, sum(start < starts[dropped] for start in starts) if dropped else 0

    def _cut_conversation(self, conversation: Conversation, limit: int) -> list[int] | None:
        versions = shortened(conversation.messages)

        def with_text(place: int, text: str) -> list[int]:
            changed = (*messages[:place], replace(messages[place], text=text), *messages[place + 1 :])
            return self._render(replace(conversation, messages=changed))

        def fits(version: int) -> bool:
            return len(self._render(replace(conversation, messages=versions[version]))) <= limit

        first = bisect_left(range(len(versions)), True, key=fits)
        if first < len(versions):
            return self._render(replace(conversation, messages=versions[first]))
        messages = versions[-1]
        # The longest text first: a short question about a long result is kept.
        places = [place for place, message in enumerate(messages) if message.role != "system"]
        for place in sorted(places, key=lambda at: -len(messages[at].text)):
            text = messages[place].text
            found = self._cut(text, with_text(place, text), partial(with_text, place), limit)
            if found is not None:
                return found[0]
            messages = (*messages[:place], replace(messages[place], text=""), *messages[place + 1 :])
        return None

    def _render(self, prompt: Prompt) -> list[int]:
        if self._template == "chat":
            asked = prompt if isinstance(prompt, Conversation) else Conversation((Message("user", prompt),), prompt)
            text = self._chat.render(asked)
            # The template writes its own special tokens; adding a second bos would change the answers.
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        text = transcript(prompt) if isinstance(prompt, Conversation) else prompt
        if self._template == "alpaca":
            text = _ALPACA.format(text=text)
        elif callable(self._template):
            text = self._template(text)
        return self._without_doubles(list(self._tokenizer(text)["input_ids"]), text)

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
