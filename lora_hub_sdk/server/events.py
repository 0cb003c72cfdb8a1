"""What a stream's news are as server-sent events in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final

from lora_hub_sdk.messages import ToolCallPiece
from lora_hub_sdk.server.feed import News
from lora_hub_sdk.server.json_bytes import json_bytes
from lora_hub_sdk.server.refusals import Refusal
from lora_hub_sdk.server.replies import Letterhead, usage_data
from lora_hub_sdk.types import Completion

_DONE: Final = b"data: [DONE]\n\n"


class Events:
    """Writes one answer's events, and keeps its completions for the last of them. One choice an event.

    Args:
        count: how many choices there are.
        with_usage: whether the token counts come at the end.
    """

    def __init__(self, head: Letterhead, count: int, *, with_usage: bool) -> None:
        self._head = head
        self._count = count
        self._usage: dict[str, Any] = {"usage": None} if with_usage else {}
        self._whole: list[Completion] = []

    def opening(self) -> bytes:
        """Chat tells the role before anything else."""
        return b"".join(map(self._event, self._head.opening(self._count)))

    def of(self, news: Sequence[News]) -> bytes:
        """All that came since the last time."""
        return b"".join(map(self._event, self._choices(news)))

    def closing(self) -> bytes:
        """After the last completion."""
        if not self._usage:
            return _DONE
        return _event(self._head.part([], usage=usage_data(self._whole))) + _DONE

    def broken(self, refusal: Refusal) -> bytes:
        """There will be no more, and why."""
        return _event(refusal.body)

    def _choices(self, news: Sequence[News]) -> Iterator[dict[str, Any]]:
        for (place, kind), group in groupby(news, key=lambda one: (one[0], type(one[1]))):
            pieces: list[Any] = [piece for _, piece in group]
            if kind is str:
                yield self._head.text(place, "".join(pieces))
            elif kind is ToolCallPiece:
                yield self._head.calls(place, _together(pieces))
            else:
                self._whole += pieces
                yield from (self._head.end(place, one) for one in pieces)

    def _event(self, choice: dict[str, Any]) -> bytes:
        return _event(self._head.part([choice], **self._usage))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(data) + b"\n\n"


def _together(pieces: Sequence[ToolCallPiece]) -> list[ToolCallPiece]:
    """One piece for each call, as clients put together what several events bring, not what one does."""
    calls: dict[int, ToolCallPiece] = {}
    for piece in pieces:
        before = calls.get(piece.index)
        calls[piece.index] = piece if before is None else replace(before, arguments=before.arguments + piece.arguments)
    return list(calls.values())
