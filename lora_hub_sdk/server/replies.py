"""Completions in OpenAI's form, as plain dictionaries, with the route beside."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_hub_sdk.chat.openai_form import call_row
from lora_hub_sdk.faces.adapter_facts import route_facts, shown_name
from lora_hub_sdk.messages import ToolCall, ToolCallPiece
from lora_hub_sdk.types import Completion, Trace

Kind = Literal["text", "chat"]


def route_data(trace: Trace) -> dict[str, Any]:
    """How an answer came about."""
    return {
        **route_facts(trace.route),
        "base_model": shown_name(trace.base_model),
        "truncated_tokens": trace.truncated_tokens,
    }


def usage_data(completions: Iterable[Completion]) -> dict[str, int]:
    """The token counts of all of them together."""
    counts = [completion.usage for completion in completions]
    prompt, answer = sum(one.prompt_tokens for one in counts), sum(one.completion_tokens for one in counts)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


@dataclass(frozen=True, slots=True)
class Letterhead:
    """What every part of one answer begins with. ``model`` is what the client asked for."""

    kind: Kind
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def answer_id(self) -> str:
        """As clients know it."""
        return f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{self.id}"

    def answer(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer as a whole. ``route`` is the first choice's; where there are several, each has its own too."""
        several = len(completions) > 1
        return {
            **self._head("chat.completion" if self.kind == "chat" else "text_completion"),
            "choices": [
                {
                    "index": place,
                    **({"message": _message(one)} if self.kind == "chat" else {"text": one.text}),
                    "logprobs": None,
                    "finish_reason": _finish_reason(one),
                    **({"route": route_data(one.trace)} if several else {}),
                }
                for place, one in enumerate(completions)
            ],
            "usage": usage_data(completions),
            "route": route_data(completions[0].trace),
        }

    def part(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        return {
            **self._head("chat.completion.chunk" if self.kind == "chat" else "text_completion"),
            "choices": choices,
            **more,
        }

    def opening(self, count: int) -> list[dict[str, Any]]:
        """The choices of a stream's first part; a chat tells the role before anything else."""
        if self.kind == "text":
            return []
        return [self._choice(place, {"role": "assistant", "content": ""}) for place in range(count)]

    def text(self, place: int, text: str) -> dict[str, Any]:
        """A choice with more text."""
        if self.kind == "text":
            return {"index": place, "text": text, "logprobs": None, "finish_reason": None}
        return self._choice(place, {"content": text})

    def calls(self, place: int, pieces: Sequence[ToolCallPiece]) -> dict[str, Any]:
        """A choice with parts of calls."""
        return self._choice(place, {"tool_calls": [_call_piece(piece) for piece in pieces]})

    def end(self, place: int, completion: Completion) -> dict[str, Any]:
        """A choice that is complete."""
        finish, route = _finish_reason(completion), route_data(completion.trace)
        if self.kind == "text":
            return {"index": place, "text": "", "logprobs": None, "finish_reason": finish, "route": route}
        return {**self._choice(place, {}), "finish_reason": finish, "route": route}

    def _choice(self, place: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}


def _message(completion: Completion) -> dict[str, Any]:
    calls = _call_rows(completion)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": completion.text or (None if calls else ""),
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = calls
    return message


def _call_rows(completion: Completion) -> list[dict[str, Any]]:
    """All calls, malformed ones too: OpenAI's clients expect that arguments may be no JSON, and find it out."""
    named = [ToolCall(one.name, one.arguments, one.id) for one in completion.invalid_tool_calls if one.name]
    return [call_row(call) for call in (*completion.tool_calls, *named)]


def _call_piece(piece: ToolCallPiece) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name, **function}}


def _finish_reason(completion: Completion) -> str:
    called = completion.tool_calls or any(one.name for one in completion.invalid_tool_calls)
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason
