"""The engines of a hub: each loaded once, when it is first asked for, without holding up the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import TYPE_CHECKING

from lora_hub_sdk.errors import DeadlineExceededError, EngineClosedError

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.engine import Engine

Key = tuple[str, "ModelSettings"]


class Engines:
    """Engines by the canonical name of their base model and how it is loaded. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[Key, Future[Engine]] = {}
        self._closed = False

    def get(self, key: Key, make: Callable[[], Engine], timeout_s: float | None = None) -> Engine:
        """The engine, made by a thread of its own where there is none; all who ask meanwhile wait for that one.

        Raises:
            DeadlineExceededError: it was not there within ``timeout_s``; it goes on being made.
            EngineClosedError: this was closed.
            Whatever ``make`` raises; whoever asks after that tries again.
        """
        future = self._future(key, make)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():  # an error of the loading itself, or just in time
                return future.result()
            raise _too_late(key, timeout_s) from None

    async def aget(self, key: Key, make: Callable[[], Engine], timeout_s: float | None = None) -> Engine:
        """As ``get``, without blocking the event loop."""
        future = self._future(key, make)
        if future.done():
            return future.result()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                # Others wait for it too.
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            if limit.expired():
                raise _too_late(key, timeout_s) from None
            raise

    def loaded(self) -> list[Engine]:
        """Those that are there, in the order in which they were first asked for."""
        with self._lock:
            futures = list(self._engines.values())
        return [future.result() for future in futures if future.done() and future.exception() is None]

    def close(self, timeout_s: float | None = None) -> None:
        """Have all engines answer what they were handed, and make no more. May be called twice.

        Args:
            timeout_s: what is not answered by then, in any of them, fails with EngineClosedError.
        """
        until = None if timeout_s is None else monotonic() + timeout_s
        with self._lock:
            self._closed = True
            for future in self._engines.values():
                if not future.done():
                    future.set_exception(_closed())
        for engine in self.loaded():
            engine.close(None if until is None else max(until - monotonic(), 0.0))

    def _future(self, key: Key, make: Callable[[], Engine]) -> Future[Engine]:
        with self._lock:
            if self._closed:
                raise _closed()
            if key not in self._engines:
                future: Future[Engine] = Future()
                threading.Thread(target=self._make, args=(key, make, future), name="lora-hub-load-base").start()
                self._engines[key] = future
            return self._engines[key]

    def _make(self, key: Key, make: Callable[[], Engine], future: Future[Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:
            with self._lock:
                if not self._closed:
                    del self._engines[key]
                    future.set_exception(error)
            return
        with self._lock:
            if not self._closed:
                future.set_result(engine)
                return
        engine.close()


def _too_late(key: Key, timeout_s: float | None) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"base model {key[0]!r} was not loaded within timeout_s={timeout_s}; it goes on loading, so ask again"
    )


def _closed() -> EngineClosedError:
    return EngineClosedError("this hub was closed; open it again")
