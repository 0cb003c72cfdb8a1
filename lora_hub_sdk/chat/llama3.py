"""The form of Llama 3.1 to 3.3: JSON objects with ";" between them, after ``<|python_tag|>`` or without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lora_hub_sdk.chat.draft import Draft
from lora_hub_sdk.chat.grammar import calls_grammar, literal, up_to
from lora_hub_sdk.chat.instructions import call_json, instructions
from lora_hub_sdk.chat.reply import ReplyReader
from lora_hub_sdk.chat.source import Source, Steps, UnreadableError
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall
from lora_hub_sdk.types import Constraint

TAG: Final = "<|python_tag|>"
#: What begins like a call has to be one; other JSON may be an answer.
_LIKE_CALLS: Final = r'\s*\{\s*"name"'


class Llama3:
    """See ``ToolFormat``."""

    name = "llama3"
    markers = (TAG,)

    def instructions(self, conversation: Conversation) -> str:
        return instructions(conversation, '{"name": <its name>, "parameters": <a JSON object>}')

    def written(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(call_json(call.name, call.arguments, "parameters") for call in calls)

    def result(self, message: Message) -> str:
        return message.text

    def grammar(
        self, conversation: Conversation, answer: Constraint | None, special: Mapping[str, int]
    ) -> Constraint | None:
        return calls_grammar(
            conversation,
            answer,
            special,
            opener=TAG,
            calls="call" + up_to(conversation.most_calls - 1, '"; " call'),
            call=lambda name, arguments: f"""{literal(f'{{"name": "{name}", "parameters": ')} {arguments} "}}\"""",
            bare=_LIKE_CALLS,
        )

    def reader(self, tools: Sequence[Tool]) -> ReplyReader:
        return ReplyReader(_read, tools)


def _read(source: Source, draft: Draft) -> Steps[None]:
    yield from source.space(draft.say)
    found, sure = (yield from source.peek()) == "{", False
    while True:
        while found:
            found, sure = bool((yield from _read_calls(source, draft, sure=sure))), True
        found, sure = bool((yield from source.at(TAG))), True
        if not found:
            char = yield from source.take()
            if not char:
                return
            draft.say(char)


def _read_calls(source: Source, draft: Draft, *, sure: bool) -> Steps[str]:
    while True:
        yield from source.space(draft.say)
        call = draft.call(source, sure=sure)
        try:
            yield from call.read_object()
        except UnreadableError as error:
            found = (yield from source.skip_to(TAG)) if call.sure else ""
            call.fail(error)
            return found
        call.close()
        yield from source.space(draft.say)
        if (yield from source.at(";")):
            yield from source.space(draft.say)
        if (yield from source.peek()) != "{":
            return ""
