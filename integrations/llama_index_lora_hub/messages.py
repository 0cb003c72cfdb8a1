"""LlamaIndex's messages and tools as rows of OpenAI's form, and calls as LlamaIndex's blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.utils import parse_partial_json

from lora_hub_sdk.messages import ToolCall

#: Other words for the assistant, of other providers' models.
_ASSISTANT: Final = (MessageRole.ASSISTANT, MessageRole.CHATBOT, MessageRole.MODEL)


def rows_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form. Thoughts and marks of caches are left out; other blocks stay by their type's name."""
    return [_row(message) for message in messages]


def call_blocks(calls: Iterable[ToolCall]) -> list[ContentBlock]:
    """Calls as blocks; arguments stay the text that was generated, so that they go back to the model as they came."""
    return [ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls]


def arguments_of(block: ToolCallBlock) -> dict[str, Any]:
    """A call's arguments; of one that is still being written, what can be read by now."""
    if not isinstance(block.tool_kwargs, str):
        return block.tool_kwargs
    try:
        found = parse_partial_json(block.tool_kwargs)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _row(message: ChatMessage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "role": "assistant" if message.role in _ASSISTANT else message.role.value,
        "content": _content(message.blocks),
    }
    if row["role"] == "assistant":
        blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
        calls = [_call_row(block) for block in blocks] or message.additional_kwargs.get("tool_calls")
        if calls:
            row["tool_calls"] = calls
    if row["role"] == "tool":
        row["tool_call_id"] = message.additional_kwargs.get("tool_call_id")
    if message.additional_kwargs.get("name") is not None:
        row["name"] = message.additional_kwargs["name"]
    return row


def _content(blocks: Sequence[ContentBlock]) -> str | list[dict[str, Any]]:
    parts: list[str | dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            parts.append(block.text)
        elif isinstance(block, CitableBlock):
            parts.append(f"{block.title}\n{_content(block.content)}")
        elif isinstance(block, CitationBlock) and isinstance(block.cited_content, TextBlock):
            parts.append(block.cited_content.text)
        elif not isinstance(block, ThinkingBlock | CachePoint | ToolCallBlock):
            parts.append({"type": block.block_type})
    if all(isinstance(part, str) for part in parts):
        return "\n".join(map(str, parts))  # as LlamaIndex itself puts a message's texts together
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _call_row(block: ToolCallBlock) -> dict[str, Any]:
    given = block.tool_kwargs
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {"id": block.tool_call_id, "type": "function", "function": {"name": block.tool_name, "arguments": text}}
