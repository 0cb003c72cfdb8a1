"""Between LangChain's messages and ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, InvalidToolCall, convert_to_openai_messages
from langchain_core.messages import tool as lc_tools
from langchain_core.messages.ai import UsageMetadata
from langchain_core.utils.json import parse_partial_json

from langchain_lora_hub.answer_info import info_of
from lora_hub_sdk.chat.openai_form import call_row, messages_of
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Message, Piece, ToolCall
from lora_hub_sdk.types import Completion

#: Blocks of an answer that a model is not shown again: calls stand beside the content, thoughts are over.
_UNSHOWN: Final = frozenset({"tool_call", "tool_call_chunk", "invalid_tool_call", "reasoning", "thinking"})


def conversation_of(messages: Sequence[BaseMessage]) -> tuple[Message, ...]:
    """LangChain's messages as a conversation has them.

    Raises:
        ConfigurationError: content that is no text; its place is named.
    """
    rows: list[Mapping[str, Any]] = []
    for place, message in enumerate(messages):
        try:
            # Texts of several blocks are put together by us, as they are.
            found = convert_to_openai_messages([_shown(message)], text_format="block")
        except ValueError as error:
            raise ConfigurationError(f"messages[{place}] cannot be read: {error}") from error
        if isinstance(message, AIMessage) and message.invalid_tool_calls:
            # So that a model sees what it did wrong, and answers of such calls have something to answer.
            found[0]["tool_calls"] = [*found[0].get("tool_calls", ()), *map(_row, message.invalid_tool_calls)]
        rows += found
    return messages_of(rows)


def message_of(completion: Completion, metadata: dict[str, Any]) -> AIMessage:
    """An answer as LangChain has it."""
    return AIMessage(
        completion.text,
        tool_calls=[_call(call) for call in completion.tool_calls],
        invalid_tool_calls=[
            lc_tools.invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=call.error)
            for call in completion.invalid_tool_calls
        ],
        usage_metadata=_usage(completion),
        response_metadata=metadata,
    )


class Chunks:
    """One answer's pieces as LangChain has them, to be added up."""

    def __init__(self) -> None:
        #: By its index: the id of a call, and its arguments so far.
        self._calls: dict[int, tuple[str | None, str]] = {}

    def of(self, piece: Piece) -> AIMessageChunk:
        if isinstance(piece, str):
            return AIMessageChunk(content=piece)
        known, arguments = self._calls.get(piece.index, (None, ""))
        self._calls[piece.index] = (piece.id or known, arguments + piece.arguments)
        return AIMessageChunk(
            content="",
            tool_call_chunks=[
                lc_tools.tool_call_chunk(name=piece.name, args=piece.arguments, id=piece.id, index=piece.index)
            ],
        )

    def last(self, completion: Completion, metadata: dict[str, Any]) -> AIMessageChunk:
        """The facts of the whole answer.

        LangChain reads half an object as a whole one when it adds chunks up, and an agent would make that call. So
        what was no call gets an end that nothing can be made of.
        """
        index_of = {known: index for index, (known, _) in self._calls.items()}
        chunks = []
        for number, call in enumerate(completion.invalid_tool_calls, len(self._calls)):
            if (index := index_of.get(call.id)) is not None:
                spoiled = _unreadable_end(self._calls[index][1])
                chunks.append(lc_tools.tool_call_chunk(args=spoiled, index=index))
            else:
                text = call.arguments + _unreadable_end(call.arguments)
                chunks.append(lc_tools.tool_call_chunk(name=call.name, args=text, id=call.id, index=number))
        return AIMessageChunk(
            content="",
            tool_call_chunks=chunks,
            usage_metadata=_usage(completion),
            response_metadata=metadata,
            chunk_position="last",
        )


def metadata_of(completion: Completion, *, model_name: str, model_provider: str) -> dict[str, Any]:
    """``response_metadata``: as ``info_of``, with what LangChain expects of every chat model."""
    names = {"model_name": model_name, "model_provider": model_provider}
    return {**info_of(completion), "finish_reason": completion.outcome, **names}


def _shown(message: BaseMessage) -> BaseMessage:
    if not isinstance(message, AIMessage) or isinstance(message.content, str):
        return message
    kept = [block for block in message.content if isinstance(block, str) or block.get("type") not in _UNSHOWN]
    return message.model_copy(update={"content": kept})


def _row(call: InvalidToolCall) -> dict[str, Any]:
    own = ToolCall(call["name"] or "unknown", call["args"] or "", call["id"] or "")
    return call_row(own)


def _call(call: ToolCall) -> lc_tools.ToolCall:
    return lc_tools.tool_call(name=call.name, args=json.loads(call.arguments), id=call.id)


def _usage(completion: Completion) -> UsageMetadata:
    usage = completion.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
    )


def _unreadable_end(arguments: str) -> str:
    """What makes LangChain see that arguments are no whole object: nothing where it sees that already."""
    ends = ["", *map("".join, product(("", '"', '""'), ("]", "}", "]]", "}}")))]
    return next((end for end in ends if not _reads(arguments + end)), ends[-1])


def _reads(arguments: str) -> bool:
    try:
        return isinstance(parse_partial_json(arguments), dict) if arguments else True
    except ValueError:
        return False
