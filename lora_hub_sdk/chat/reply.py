"""An answer's text, read as it comes: what is text, what is a call, and what was meant as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_hub_sdk.chat.draft import Draft
from lora_hub_sdk.chat.source import Source, Steps
from lora_hub_sdk.messages import InvalidToolCall, Piece, Tool, ToolCall


@dataclass(frozen=True, slots=True)
class Reply:
    """What an answer was. ``pieces`` are those that no ``feed`` has returned yet."""

    pieces: tuple[Piece, ...]
    text: str
    tool_calls: tuple[ToolCall, ...]
    invalid_tool_calls: tuple[InvalidToolCall, ...]


class ReplyReader:
    """Reads one answer and never raises; how its text is split among the feeds changes nothing but the pieces.

    Calls count from 0 in the order they come, valid or not, and each has pieces: the first brings its id, and its name
    where there is one; their arguments, put together, are the call's.

    Args:
        read: reads an answer to its end (``hermes``, ``llama3``, ``mistral``).
        tools: calls of others are invalid.
    """

    def __init__(self, read: Callable[[Source, Draft], Steps[None]], tools: Sequence[Tool]) -> None:
        self._draft = Draft([tool.name for tool in tools])
        self._steps = read(Source(), self._draft)
        next(self._steps)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that new text brings: none while it may still be the beginning of a marker."""
        for char in text:
            self._steps.send(char)
        return self._draft.fetch()

    def finish(self) -> Reply:
        """The whole answer, once no more text comes. To be called once, and last."""
        try:
            self._steps.send("")
        except StopIteration:
            self._draft.close()
        calls = self._draft.calls
        return Reply(
            pieces=tuple(self._draft.fetch()),
            text=self._draft.text,
            tool_calls=tuple(call for call in calls if isinstance(call, ToolCall)),
            invalid_tool_calls=tuple(call for call in calls if isinstance(call, InvalidToolCall)),
        )
