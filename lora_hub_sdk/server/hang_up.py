"""Noticing that a client went away while its answer is made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from lora_hub_sdk.server.refusals import Refusal, Refused

_T = TypeVar("_T")


class Line:
    """The connection of one request whose body was read. What it watches over is given up when the client hangs up.

    One small task waits for the news that ends a connection; it costs nothing while there is none.
    """

    def __init__(self, request: Request, hang_up: Callable[[], object]) -> None:
        """
        Args:
            hang_up: called once, on the event loop, when the client is gone.
        """
        self.is_dead = False
        self._request = request
        self._hang_up = hang_up
        self._watch = asyncio.get_running_loop().create_task(self._listen())

    def close(self) -> None:
        """Listen no more; called before the answer is sent, or when all of it was."""
        self._watch.cancel()

    async def _listen(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.is_dead = True
        self._hang_up()


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What ``work`` returns; it is cancelled where the client goes away, or this task is cancelled.

    Raises:
        Refused: 499, the client is gone.
    """
    task = asyncio.get_running_loop().create_task(work)
    line = Line(request, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        if line.is_dead:
            raise gone() from None
        raise
    finally:
        line.close()


def gone() -> Refused:
    """Nobody reads it; the metrics count it."""
    return Refused(Refusal(499, "the client went away", code="gone"))
