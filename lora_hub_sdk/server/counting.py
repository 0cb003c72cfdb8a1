"""Counts requests as they pass: an ASGI layer around the whole app, as thin as it can be."""

from __future__ import annotations

from time import perf_counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_hub_sdk.server.metrics import ServerMetrics

#: What the client is told is for the log alone: it went away.
_GONE: Final = 499


class Counting:
    """Tells ``metrics`` of each request that ended: by route, status and time."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began, is_whole = _GONE, perf_counter(), False

        async def watched(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                is_whole = True
            await send(message)

        self._metrics.running.inc()
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status, is_whole = 500, True
            raise
        finally:
            self._metrics.running.dec()
            # Only the app's own paths: what clients make up would be a series each.
            path = getattr(scope.get("route"), "path", "none")
            self._metrics.ended(path, status if is_whole else _GONE, perf_counter() - began)
