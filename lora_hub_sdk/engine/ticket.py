"""What a caller holds while its request is answered: waited on from threads or asyncio, read as a stream, cancelled."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import Empty, SimpleQueue

from lora_hub_sdk.errors import RequestCancelledError
from lora_hub_sdk.messages import Piece
from lora_hub_sdk.types import Completion


class Ticket:
    """One request's answer, now or later.

    The worker shows, resolves and fails; callers do the rest. Every method may be called from any thread.
    ``future`` can be given to ``concurrent.futures.wait`` and ``as_completed``; it is never marked as running, so it
    can be cancelled for as long as the answer is not complete.
    """

    def __init__(self, on_cancel: Callable[[], None], *, stream: bool) -> None:
        """
        Args:
            on_cancel: called once, in the thread that cancels. That may be an event loop's, or any thread in the midst
                of a garbage collection, so it must neither block nor take a lock (``SimpleQueue.put`` is safe).
            stream: whether pieces are kept; else ``pieces`` and ``apieces`` have the completion alone.
        """
        self.future: Future[Completion] = Future()
        self._on_cancel = on_cancel
        self.streams = stream
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()  # None: there will be no more
        self._wake: Callable[[], None] | None = None
        self.future.add_done_callback(self._end)

    # -- the worker's side: nothing here raises, whatever the caller has done meanwhile

    def show(self, piece: Piece) -> None:
        """Text, or a part of a call, that is final."""
        if self.streams and not self.future.done():
            self._put(piece)

    def resolve(self, completion: Completion) -> None:
        """The answer is complete."""
        with suppress(InvalidStateError):
            self.future.set_result(completion)

    def fail(self, error: BaseException) -> None:
        """There will be no answer. Tickets that fail together need an error each: a traceback grows with each raise."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    # -- the caller's side

    def cancel(self) -> bool:
        """Give the request up; False where it has its answer or its error already."""
        return self.future.cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the answer, at most ``timeout`` seconds; the request goes on after that.

        Raises:
            TimeoutError: it is not there yet.
            RequestCancelledError: somebody cancelled the request.
            GenerationError: why there is no answer.
        """
        try:
            return self.future.result(timeout)
        except concurrent.futures.CancelledError:
            raise RequestCancelledError(
                "this request was cancelled before its answer was complete; send it again if it is still wanted"
            ) from None

    def pieces(self) -> Generator[Piece | Completion]:
        """Text and calls as they become final, then the completion; once begun, closing it early cancels the request.

        Raises:
            As ``result``.
        """
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
            self._pieces.put(None)  # whoever reads after this one must not wait for ever
            yield self.result()
        finally:
            self.cancel()

    async def apieces(self) -> AsyncGenerator[Piece | Completion]:
        """As ``pieces``, on the running event loop; cancelling the task that reads cancels the request.

        Raises:
            As ``result``.
        """
        news = asyncio.Event()
        self._wake = _in_this_loop(news)
        try:
            while True:
                news.clear()
                with suppress(Empty):
                    while (piece := self._pieces.get_nowait()) is not None:
                        yield piece
                    self._pieces.put(None)
                    break
                await news.wait()
            yield self.result()
        finally:
            self.cancel()

    async def aresult(self) -> Completion:
        """Wait on the running event loop; cancelling the task that waits cancels the request.

        Raises:
            As ``result``.
        """
        done = asyncio.Event()
        wake = _in_this_loop(done)
        self.future.add_done_callback(lambda _: wake())
        try:
            await done.wait()
        finally:
            self.cancel()
        return self.result()

    def _put(self, piece: Piece | None) -> None:
        self._pieces.put(piece)
        if self._wake is not None:
            self._wake()

    def _end(self, future: Future[Completion]) -> None:
        self._put(None)
        if future.cancelled():
            # Without this, concurrent.futures.wait never counts a cancelled future as done.
            future.set_running_or_notify_cancel()
            self._on_cancel()
        # A ticket outlives its engine where a stream is read slowly, and must not keep the model in memory.
        self._on_cancel = _nothing


def _nothing() -> None:
    """There is nothing left to cancel."""


def _in_this_loop(event: asyncio.Event) -> Callable[[], None]:
    """A function that sets an event of the running loop from any thread, and does nothing once the loop is closed."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    return wake
