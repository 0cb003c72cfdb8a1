"""Many calls on one event loop: their outcomes as they come, and such a loop beside a thread that has none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")

#: Starts one call.
Start = Callable[[], Coroutine[Any, Any, _T]]


async def outcomes(
    starts: Sequence[Start[_T]], *, at_once: int | None = None, return_exceptions: bool = False
) -> AsyncGenerator[tuple[int, _T | Exception]]:
    """What each call returned, with its place, the first that ended first.

    Calls that still run when it is closed, or when one fails, are cancelled.

    Args:
        at_once: how many run at a time; None for all.
        return_exceptions: whether what a call raised is its outcome; else it is raised here.
    """
    turn = asyncio.Semaphore(at_once or max(len(starts), 1))

    async def outcome(place: int) -> tuple[int, _T | Exception]:
        async with turn:
            try:
                return place, await starts[place]()
            except Exception as error:
                if not return_exceptions:
                    raise
                return place, error

    # Each task has its own copy of the context, so no call sees what another one sets.
    tasks = [asyncio.create_task(outcome(place)) for place in range(len(starts))]
    try:
        for ended in asyncio.as_completed(tasks):
            yield await ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def read_aside(source: Callable[[], AsyncGenerator[_T]]) -> Generator[_T]:
    """Yield what an asynchronous generator yields, from one event loop in one thread, with the caller's context.

    Closing it early, or an interrupt, closes the generator.
    """
    context = copy_context()
    news: SimpleQueue[tuple[_T] | None] = SimpleQueue()
    stops: list[Callable[[], object]] = []

    async def pump() -> None:
        async with aclosing(source()) as items:
            async for item in items:
                news.put((item,))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(pump(), context=context)
        stops.append(lambda: loop.call_soon_threadsafe(task.cancel))
        await task

    with ThreadPoolExecutor(1, "lora-hub-batch") as aside:
        future = aside.submit(lambda: asyncio.run(main()))
        future.add_done_callback(lambda _: news.put(None))
        try:
            while (item := news.get()) is not None:
                yield item[0]
            future.result()
        finally:
            with suppress(RuntimeError):  # the loop has just ended
                for stop in stops if not future.done() else ():
                    stop()
