"""Completions, and what comes before they are complete, as LlamaIndex's responses."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
)

from llama_index_lora_hub.messages import call_blocks
from lora_hub_sdk.chat.openai_form import call_row
from lora_hub_sdk.messages import Piece, ToolCall
from lora_hub_sdk.types import Completion


class Reading:
    """One answer as it comes: every response holds all that came by now, and ``delta`` what is new.

    ``raw`` is None until the last response, which tells usage, route and why the answer ended.
    """

    def __init__(self) -> None:
        self._text = ""
        self._calls: dict[int, ToolCall] = {}

    def completed(self, piece: Piece | Completion) -> CompletionResponse:
        """The answer to a prompt, up to this piece."""
        if isinstance(piece, Completion):
            return completed(piece, delta="")
        delta = self._take(piece)
        return CompletionResponse(text=self._text, delta=delta)

    def chatted(self, piece: Piece | Completion) -> ChatResponse:
        """The answer to a conversation, up to this piece; a call's arguments are the text that came by now."""
        if isinstance(piece, Completion):
            return chatted(piece, delta="")
        delta = self._take(piece)
        return ChatResponse(message=_message(self._text, tuple(self._calls.values())), delta=delta)

    def _take(self, piece: Piece) -> str:
        if isinstance(piece, str):
            self._text += piece
            return piece
        call = self._calls.get(piece.index, ToolCall(piece.name or "", "", piece.id or ""))
        self._calls[piece.index] = replace(call, arguments=call.arguments + piece.arguments)
        return ""


def completed(completion: Completion, delta: str | None = None) -> CompletionResponse:
    """The whole answer to a prompt."""
    raw = _raw(completion)
    return CompletionResponse(text=completion.text, raw=raw, additional_kwargs=dict(raw["usage"]), delta=delta)


def chatted(completion: Completion, delta: str | None = None) -> ChatResponse:
    """The whole answer to a conversation."""
    raw, message = _raw(completion), _message(completion.text, completion.tool_calls)
    if completion.invalid_tool_calls:
        message.additional_kwargs["invalid_tool_calls"] = [asdict(call) for call in completion.invalid_tool_calls]
    return ChatResponse(message=message, raw=raw, additional_kwargs=dict(raw["usage"]), delta=delta)


def _message(text: str, calls: tuple[ToolCall, ...]) -> ChatMessage:
    blocks: list[ContentBlock] = [TextBlock(text=text)] if text or not calls else []
    # LlamaIndex's older parts know calls from here only, and take an empty list for some.
    older = {"tool_calls": [call_row(call) for call in calls]} if calls else {}
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[*blocks, *call_blocks(calls)], additional_kwargs=older)


def _raw(completion: Completion) -> dict[str, Any]:
    trace = completion.trace
    return {
        "model": trace.base_model,
        "route": trace.route.as_dict(),
        "usage": completion.usage.as_dict(),
        "finish_reason": completion.outcome,
        "truncated_tokens": trace.truncated_tokens,
        "tiers": list(trace.tiers),
        "timing": None if trace.timing is None else trace.timing.as_dict(),
    }
