"""The form of Hermes and Qwen models: each call a JSON object between ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lora_hub_sdk.chat.draft import Draft
from lora_hub_sdk.chat.grammar import calls_grammar, literal, marker, up_to
from lora_hub_sdk.chat.instructions import call_json, instructions
from lora_hub_sdk.chat.reply import ReplyReader
from lora_hub_sdk.chat.source import Source, Steps, UnreadableError
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall
from lora_hub_sdk.types import Constraint

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class Hermes:
    """See ``ToolFormat``. Where a template tells of no form, this is the one that models are told of."""

    name = "hermes"
    markers = (OPEN, CLOSE)

    def instructions(self, conversation: Conversation) -> str:
        return instructions(conversation, f'{OPEN}\n{{"name": <its name>, "arguments": <a JSON object>}}\n{CLOSE}')

    def written(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"{OPEN}\n{call_json(call.name, call.arguments)}\n{CLOSE}" for call in calls)

    def result(self, message: Message) -> str:
        return f"<tool_response>\n{message.text}\n</tool_response>"

    def grammar(
        self, conversation: Conversation, answer: Constraint | None, special: Mapping[str, int]
    ) -> Constraint | None:
        one = rf'"\n" call "\n" {marker(CLOSE, special)}'
        more = up_to(conversation.most_calls - 1, rf'"\n" {marker(OPEN, special)} {one}')
        return calls_grammar(
            conversation,
            answer,
            special,
            opener=OPEN,
            calls=one + more,
            call=lambda name, arguments: f"""{literal(f'{{"name": "{name}", "arguments": ')} {arguments} "}}\"""",
        )

    def reader(self, tools: Sequence[Tool]) -> ReplyReader:
        return ReplyReader(_read, tools)


def _read(source: Source, draft: Draft) -> Steps[None]:
    while True:
        found = yield from source.at(OPEN)
        if not found:
            char = yield from source.take()
            if not char:
                return
            draft.say(char)
        # A call that nobody closed is closed by the next one.
        while found == OPEN:
            found = yield from _read_call(source, draft)


def _read_call(source: Source, draft: Draft) -> Steps[str]:
    call = draft.call(source)
    try:
        yield from source.space()
        yield from call.read_object()
        yield from source.space()
        found = yield from source.at(CLOSE, OPEN)
        if not found and (yield from source.peek()):
            raise UnreadableError("something follows its JSON")
    except UnreadableError as error:
        found = yield from source.skip_to(CLOSE, OPEN)
        call.fail(error)
    else:
        call.close()
    return found
