"""A conversation as the text that a chat template makes of it, and shorter versions of one that is too long."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.chat.formats import ToolFormat, format_of, shows_tools
from lora_hub_sdk.chat.openai_form import tool_row
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What Mistral's templates insist on; others write no ids.
_SHORT_ID: Final = re.compile(r"[A-Za-z0-9]{9}")


class ChatTemplate:
    """One tokenizer's chat template, or the one that an adapter brings.

    Templates without tools have these told of in the system message. Where a template refuses system messages, or turns
    that do not alternate, the system's text goes in front of the first user message, and neighbours become one.

    Args:
        own: the adapter's, a stranger's program that runs in transformers' sandbox.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: str | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self.own = own

    def format(self, conversation: Conversation) -> ToolFormat:
        """How calls are written in it."""
        return format_of(self._text(conversation))

    def render(self, conversation: Conversation) -> str:
        """The prompt, up to where the answer begins.

        Raises:
            ConfigurationError: the template fails on it.
        """
        template = self._text(conversation)
        messages, tools = conversation.messages, conversation.callable_tools
        calling = tools or any(message.tool_calls or message.role == "tool" for message in messages)
        if calling and not shows_tools(template):
            messages, tools = told_in_text(conversation, format_of(template)), ()
        found: list[Exception] = []
        changes: Sequence[Callable[[Sequence[Message]], Sequence[Message]]] = (
            tuple,
            one_call_each,
            alternating,
            lambda them: one_call_each(alternating(them)),
        )
        for as_text, change in product((False, True), changes):
            changed = change(messages)
            try:
                text = self._apply(template, changed, tools, as_text)
            except Exception as error:  # templates are programs, and refuse in ways of their own
                found.append(error)
                continue
            if all(message.text.strip() in text for message in changed if message.role == "system"):
                return text
            found.append(ValueError("it leaves the system message out"))
        whose = "the chat template" if self.own is None else "the adapter's own chat template"
        raise ConfigurationError(
            f"{whose} fails ({type(found[0]).__name__}: {str(found[0])[:200]}); use another one, or messages that it "
            "takes"
        ) from found[0]

    def _text(self, conversation: Conversation) -> str:
        if self.own is not None:
            return self.own
        try:
            # A tokenizer may have several, one of them for conversations with tools.
            return str(self._tokenizer.get_chat_template(None, [{}] if conversation.callable_tools else None))
        except ValueError as error:
            raise ConfigurationError(f"the tokenizer's chat templates cannot be used: {error}") from error

    def _apply(self, template: str, messages: Sequence[Message], tools: Sequence[Tool], as_text: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                _rows(messages, as_text),
                tools=list(map(tool_row, tools)) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )


def told_in_text(conversation: Conversation, form: ToolFormat) -> tuple[Message, ...]:
    """Its messages for templates without tools: the system tells of the tools, texts hold calls and their results."""
    messages: list[Message] = []
    before = ""
    for message in conversation.messages:
        if message.role == "tool":
            results = [messages.pop().text] if before == "tool" else []
            messages.append(Message("user", "\n".join([*results, form.result(message)])))
        elif message.tool_calls:
            texts = [message.text, form.written(message.tool_calls)]
            messages.append(Message("assistant", "\n".join(filter(None, texts))))
        else:
            messages.append(message)
        before = message.role
    if conversation.callable_tools:
        told = form.instructions(conversation)
        if messages[0].role == "system":
            messages[0] = replace(messages[0], text="\n\n".join(filter(None, [messages[0].text, told])))
        else:
            messages.insert(0, Message("system", told))
    return tuple(messages)


def alternating(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same without system messages, and without two turns of one role beside each other but for results."""
    system = [message.text for message in messages if message.role == "system"]
    merged: list[Message] = []
    for message in messages:
        if message.role == "system":
            continue
        if merged and message.role == merged[-1].role != "tool":
            before = merged.pop()
            texts = "\n\n".join(filter(None, [before.text, message.text]))
            message = replace(before, text=texts, tool_calls=before.tool_calls + message.tool_calls)
        merged.append(message)
    if system:
        if not merged or merged[0].role != "user":
            merged.insert(0, Message("user"))
        merged[0] = replace(merged[0], text="\n\n".join(filter(None, [*system, merged[0].text])))
    return tuple(merged)


def one_call_each(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same with each of several calls at once in a message of its own, before its result."""
    made: list[Message] = []
    results: dict[str, Message] = {}
    for place, message in enumerate(messages):
        if message.role == "assistant" and len(message.tool_calls) > 1:
            after = takewhile(lambda one: one.role == "tool", messages[place + 1 :])
            results |= {one.tool_call_id: one for one in after if one.tool_call_id is not None}
            for at, call in enumerate(message.tool_calls):
                made.append(replace(message, text="" if at else message.text, tool_calls=(call,)))
                made += [results[call.id]] if call.id in results else []
        elif not any(message is one for one in results.values()):
            made.append(message)
    return tuple(made)


def shortened(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """The messages, then ever fewer of them: without the first turn, the first two, and so on.

    A turn is what the user says and all up to where the user speaks again. The last turn keeps what the user said, and
    loses its oldest steps (a call with its results). System messages stay.
    """
    spoken = [place for place, message in enumerate(messages) if message.role != "system"]
    roles = [messages[place].role for place in spoken]
    turns = [at for at, role in enumerate(roles) if at == 0 or (role == "user" != roles[at - 1])]
    last = turns[-1] if turns else 0
    asked = next((at for at in range(last, len(roles)) if roles[at] != "user"), len(roles))
    steps = [at for at in range(asked + 1, len(roles)) if roles[at] != "tool"]
    lost = [range(turn) for turn in turns] + [[*range(last), *range(asked, step)] for step in steps]
    versions = []
    for places in lost:
        gone = {spoken[at] for at in places}
        versions.append(tuple(message for place, message in enumerate(messages) if place not in gone))
    return versions or [tuple(messages)]


def _rows(messages: Sequence[Message], as_text: bool) -> list[dict[str, Any]]:
    """As chat templates take them: OpenAI's form, but most of them (not DeepSeek's) take arguments that are no text."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    rows: list[dict[str, Any]] = []
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.tool_calls:
            row["tool_calls"] = [_call_row(call, as_text) for call in message.tool_calls]
        if message.tool_call_id is not None:
            row["tool_call_id"] = _short_id(message.tool_call_id)
        name = message.name or names.get(message.tool_call_id or "")
        if name:
            row["name"] = name
        rows.append(row)
    return rows


def _call_row(call: ToolCall, as_text: bool) -> dict[str, Any]:
    arguments: object = call.arguments
    if not as_text:
        with suppress(ValueError):
            arguments = json.loads(call.arguments)
    return {"id": _short_id(call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _short_id(given: str) -> str:
    return given if _SHORT_ID.fullmatch(given) else hashlib.sha256(given.encode()).hexdigest()[:9]
