"""An answer sent while it is made: server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora_hub_sdk.errors import LoraHubError
from lora_hub_sdk.server.events import Events
from lora_hub_sdk.server.faults import EXPECTED, refusal_of
from lora_hub_sdk.server.feed import Feed, News
from lora_hub_sdk.server.hang_up import Line, gone

_log = logging.getLogger(__name__)
#: Seconds beyond the answer's own time that a client may take to read it.
_READING_S: Final = 60.0


class EventStream(Response):
    """Reads a feed and sends it on, all that came since the last time at once.

    The feed is given up when the client goes away, or reads too slowly to be done within ``timeout_s`` and a minute.

    Args:
        on_end: called once, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        feed: Feed,
        events: Events,
        *,
        answer_id: str,
        timeout_s: float,
        on_end: Callable[[], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": answer_id})
        self._feed = feed
        self._events = events
        self._until = asyncio.get_running_loop().time() + timeout_s + _READING_S
        self._on_end = on_end
        self._first: list[News] = []
        self._line = Line(request, feed.close)

    async def begin(self) -> None:
        """Wait for the first piece, until which an error still has a status of its own.

        Raises:
            Refused: the client went away.
            As the hub's streams.
        """
        try:
            self._first = await self._feed.take()
            if self._line.is_dead:
                raise gone()
        except BaseException:
            self._end()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            async with asyncio.timeout_at(self._until):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await _send(send, self._events.opening() + self._events.of(self._first))
                await self._send_rest(send)
        except TimeoutError:
            _log.warning("a stream was given up, as its client read too slowly")
        finally:
            self._end()

    async def _send_rest(self, send: Send) -> None:
        try:
            while news := await self._feed.take():
                await _send(send, self._events.of(news))
            if self._line.is_dead:
                return
        except LoraHubError as error:
            refusal = refusal_of(error)
            if refusal.status >= 500 and not isinstance(error, EXPECTED):
                _log.warning("a stream broke off", exc_info=error)
            await _send(send, self._events.broken(refusal), more=False)
        else:
            await _send(send, self._events.closing(), more=False)

    def _end(self) -> None:
        self._line.close()
        self._feed.close()
        self._on_end()


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
