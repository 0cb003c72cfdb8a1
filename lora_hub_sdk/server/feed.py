"""Several streams of the hub read side by side, so that what comes at the same moment is sent together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from lora_hub_sdk.messages import Piece
from lora_hub_sdk.types import Completion

#: Of which stream it came, and what.
News = tuple[int, Piece | Completion]


class Feed:
    """Begins to read at once. Closing it gives up what is not complete."""

    def __init__(self, streams: Sequence[AsyncGenerator[Piece | Completion]]) -> None:
        loop = asyncio.get_running_loop()
        self._news: list[News] = []
        self._error: Exception | None = None
        self._came = asyncio.Event()
        self._left = len(streams)
        self._tasks = [loop.create_task(self._read(place, stream)) for place, stream in enumerate(streams)]

    async def take(self) -> list[News]:
        """What came since the last time, waiting for it; an empty list once all streams are at their ends.

        Raises:
            As the streams, after what came before the error was taken.
        """
        while not self._news and self._left and self._error is None:
            self._came.clear()
            await self._came.wait()
        if not self._news and self._error is not None:
            raise self._error
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Give up what is not complete, and wake whoever waits."""
        for task in self._tasks:
            task.cancel()

    async def _read(self, place: int, stream: AsyncGenerator[Piece | Completion]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    self._news.append((place, piece))
                    self._came.set()
        except Exception as error:
            self._error = self._error or error
        finally:
            self._left -= 1
            self._came.set()
