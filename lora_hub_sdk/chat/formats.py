"""The forms in which families of models write calls, and which of them a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from lora_hub_sdk.chat.hermes import Hermes
from lora_hub_sdk.chat.llama3 import TAG, Llama3
from lora_hub_sdk.chat.mistral import ARGS, CALLS, Mistral
from lora_hub_sdk.chat.reply import ReplyReader
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall
from lora_hub_sdk.types import Constraint

_LLAMA_TURN: Final = "<|start_header_id|>"
#: What Jinja executes, and the texts within it.
_BLOCK: Final = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_QUOTED: Final = re.compile(r"""'[^']*'|"[^"]*\"""")


class ToolFormat(Protocol):
    """How one family of models is told of tools, writes calls, and is told their results.

    Attributes:
        name: "hermes", "llama3" or "mistral".
        markers: texts around calls. They have to survive decoding, also where the tokenizer has them as special tokens.
    """

    @property
    def name(self) -> str: ...
    @property
    def markers(self) -> tuple[str, ...]: ...

    def instructions(self, conversation: Conversation) -> str:
        """System text that tells of the callable tools and of this form; empty where no call may come.

        For templates that cannot show tools.
        """
        ...

    def written(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the text of an assistant's turn, for templates that cannot show them."""
        ...

    def result(self, message: Message) -> str:
        """A tool's message as the text of a user's turn, for templates that cannot show it."""
        ...

    def grammar(
        self, conversation: Conversation, answer: Constraint | None, special: Mapping[str, int]
    ) -> Constraint | None:
        """What the answer is held to; None where that is nothing.

        Args:
            answer: what an answer that is no call has to be. Where no call may come, it is what is returned.
            special: the ids of those of ``markers`` that llguidance holds for special tokens of this tokenizer
                (``LLTokenizer.is_special_token``). Not a set of names: its Lark has no way to name ``[TOOL_CALLS]``.
        """
        ...

    def reader(self, tools: Sequence[Tool]) -> ReplyReader:
        """A fresh reader of one answer that may call these tools (``Conversation.callable_tools``)."""
        ...


def format_of(chat_template: str | None) -> ToolFormat:
    """The form that a chat template writes calls in; Hermes where nothing tells."""
    text = chat_template or ""
    if CALLS in text:
        return Mistral(named=ARGS in text)
    if TAG in text or (_LLAMA_TURN in text and '"parameters": ' in text):
        return Llama3()
    return Hermes()


def shows_tools(chat_template: str | None) -> bool:
    """Whether a chat template does something with the tools that it is given."""
    blocks = _BLOCK.findall(chat_template or "")
    return any(re.search(r"(?<![\w.])tools\b", _QUOTED.sub("", block)) for block in blocks)
