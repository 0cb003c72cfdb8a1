"""The forms of Mistral's models: ``[TOOL_CALLS] [{…}, {…}]``, and since 2025 ``[TOOL_CALLS]name[ARGS]{…}``."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.chat.draft import CallDraft, Draft
from lora_hub_sdk.chat.grammar import calls_grammar, literal, marker, up_to
from lora_hub_sdk.chat.instructions import call_json, instructions
from lora_hub_sdk.chat.reply import ReplyReader
from lora_hub_sdk.chat.source import Source, Steps, UnreadableError
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall
from lora_hub_sdk.types import Constraint

CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
_NAME: Final = frozenset(string.ascii_letters + string.digits + "_-")


@dataclass(frozen=True, slots=True)
class Mistral:
    """See ``ToolFormat``. Both forms are read; ``named`` says whether the newer one is written."""

    named: bool = False

    @property
    def name(self) -> str:
        return "mistral"

    @property
    def markers(self) -> tuple[str, ...]:
        return (CALLS, ARGS, CALL_ID)

    def instructions(self, conversation: Conversation) -> str:
        whole = '[{"name": <its name>, "arguments": <a JSON object>}]'
        return instructions(conversation, f"{CALLS}<its name>{ARGS}<a JSON object>" if self.named else CALLS + whole)

    def written(self, calls: Sequence[ToolCall]) -> str:
        if self.named:
            return "".join(f"{CALLS}{call.name}{ARGS}{call.arguments}" for call in calls)
        return f"{CALLS}[{', '.join(call_json(call.name, call.arguments) for call in calls)}]"

    def result(self, message: Message) -> str:
        return message.text

    def grammar(
        self, conversation: Conversation, answer: Constraint | None, special: Mapping[str, int]
    ) -> Constraint | None:
        between = marker(CALLS, special) if self.named else '", "'
        calls = "call" + up_to(conversation.most_calls - 1, f"{between} call")

        def call(name: str, arguments: str) -> str:
            if self.named:
                return f"{literal(name)} {marker(ARGS, special)} {arguments}"
            return f"""{literal(f'{{"name": "{name}", "arguments": ')} {arguments} "}}\""""

        return calls_grammar(
            conversation,
            answer,
            special,
            opener=CALLS,
            calls=calls if self.named else f'" "? "[" {calls} "]"',
            call=call,
        )

    def reader(self, tools: Sequence[Tool]) -> ReplyReader:
        return ReplyReader(_read, tools)


def _read(source: Source, draft: Draft) -> Steps[None]:
    while True:
        found = yield from source.at(CALLS)
        if not found:
            char = yield from source.take()
            if not char:
                return
            draft.say(char)
        while found:
            yield from source.space()
            in_list = (yield from source.peek()) == "["
            found = yield from (_read_list if in_list else _read_named)(source, draft)


def _read_list(source: Source, draft: Draft) -> Steps[str]:
    after = yield from source.take()
    yield from source.space()
    if (yield from source.peek()) == "]":
        after = yield from source.take()
    while after in ("[", ","):
        call = draft.call(source)
        try:
            yield from source.space()
            yield from call.read_object()
            yield from source.space()
            # An answer that ends here has all of this call.
            after = (yield from source.peek()) and (yield from source.expect(",", "]"))
        except UnreadableError as error:
            found = yield from source.skip_to(CALLS)
            call.fail(error)
            return found
        call.close()
    return ""


def _read_named(source: Source, draft: Draft) -> Steps[str]:
    call = draft.call(source)
    try:
        yield from _read_name(source, call)
        yield from source.space()
        yield from call.read_arguments()
    except UnreadableError as error:
        found = yield from source.skip_to(CALLS)
        call.fail(error)
        return found
    call.close()
    return ""


def _read_name(source: Source, call: CallDraft) -> Steps[None]:
    name = ""
    while not (found := (yield from source.at(ARGS, CALL_ID))):
        char = yield from source.peek()
        if char not in _NAME:
            raise UnreadableError(f"{char!r} stands in its name" if char else "it is cut off")
        name += yield from source.take()
    if not name:
        raise UnreadableError("it has no name")
    call.named(name)
    if found == CALL_ID and not (yield from source.skip_to(ARGS)):
        raise UnreadableError("it is cut off")
