"""Tickets between real threads and real event loops: answers, streams, cancelling, and loops that are gone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_hub_sdk.engine.ticket import Ticket
from lora_hub_sdk.errors import DeadlineExceededError, RequestCancelledError
from lora_hub_sdk.messages import Piece
from lora_hub_sdk.types import Completion, Route, Trace, Usage

#: A test that waits longer than this has failed; none waits that long otherwise.
PATIENCE_S = 30


def answer(text: str = "yes") -> Completion:
    return Completion(text, "stop", Usage(1, 1), Trace(Route("mixture", "outputs"), 1))


class Cancels:
    """Counts the calls of ``on_cancel`` and remembers their threads."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self) -> None:
        self.threads.append(threading.current_thread())


def ticket(on_cancel: Callable[[], None] = lambda: None, *, stream: bool = True) -> Ticket:
    return Ticket(on_cancel, stream=stream)


def work(*steps: Callable[[], object]) -> threading.Thread:
    """A worker thread that does these one after the other."""

    def run() -> None:
        for step in steps:
            step()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# -- threads


def test_a_caller_gets_what_another_thread_resolves() -> None:
    one, completion = ticket(), answer()
    work(lambda: one.resolve(completion))
    assert one.result(PATIENCE_S) is completion
    assert not one.cancel()


def test_a_caller_gets_the_error_of_another_thread() -> None:
    one = ticket()
    work(lambda: one.fail(DeadlineExceededError("too late")))
    with pytest.raises(DeadlineExceededError, match="too late"):
        one.result(PATIENCE_S)


def test_waiting_ends_with_its_time_and_the_request_goes_on() -> None:
    cancels = Cancels()
    one = ticket(cancels)
    with pytest.raises(TimeoutError):
        one.result(0.001)
    one.resolve(answer())
    assert one.result(0).text == "yes"
    assert cancels.threads == []


def test_cancelling_tells_the_worker_once_and_from_the_thread_that_cancels() -> None:
    cancels = Cancels()
    one = ticket(cancels)
    waiter = ThreadPoolExecutor(1)
    waiting = waiter.submit(one.result, PATIENCE_S)
    thread = work(one.cancel)
    with pytest.raises(RequestCancelledError):
        waiting.result(PATIENCE_S)
    thread.join()
    assert one.cancel()
    assert cancels.threads == [thread]
    waiter.shutdown()


@pytest.mark.parametrize("first", [lambda one: one.cancel(), lambda one: one.resolve(answer("first"))])
def test_whatever_the_worker_does_after_the_end_is_silent_and_changes_nothing(
    first: Callable[[Ticket], object], caplog: pytest.LogCaptureFixture
) -> None:
    one = ticket()
    first(one)
    one.show("late")
    one.resolve(answer("second"))
    one.fail(DeadlineExceededError("too late"))
    if one.future.cancelled():
        with pytest.raises(RequestCancelledError):
            one.result(0)
    else:
        assert list(one.pieces()) == [answer("first")]
    assert caplog.records == []


def test_a_cancelled_ticket_counts_as_done_where_futures_are_waited_for() -> None:
    one, other = ticket(), ticket()
    thread = work(one.cancel, lambda: other.resolve(answer()))
    done, open_ones = concurrent.futures.wait([one.future, other.future], timeout=PATIENCE_S)
    thread.join()
    assert done == {one.future, other.future}
    assert not open_ones


def test_a_stream_gives_its_pieces_and_then_the_completion() -> None:
    cancels, completion = Cancels(), answer("one two")
    one = ticket(cancels)
    one.show("one")
    work(lambda: one.show(" two"), lambda: one.resolve(completion))
    assert list(one.pieces()) == ["one", " two", completion]
    assert list(one.pieces()) == [completion]
    assert cancels.threads == []


def test_a_ticket_without_stream_gives_only_the_completion() -> None:
    one = ticket(stream=False)
    work(lambda: one.show("dropped"), lambda: one.resolve(answer()))
    assert list(one.pieces()) == [answer()]


def test_a_stream_that_fails_gives_its_pieces_and_then_the_error() -> None:
    one = ticket()
    work(lambda: one.show("one"), lambda: one.fail(DeadlineExceededError("too late")))
    pieces = one.pieces()
    assert next(pieces) == "one"
    with pytest.raises(DeadlineExceededError):
        next(pieces)


def test_a_stream_that_is_left_early_cancels_the_request() -> None:
    cancels = Cancels()
    one = ticket(cancels)
    one.show("one")
    for _ in one.pieces():
        break
    assert one.future.cancelled()
    assert cancels.threads == [threading.current_thread()]


def test_a_reader_learns_that_somebody_else_cancelled() -> None:
    one = ticket()
    pieces = one.pieces()
    work(lambda: one.show("one"), one.cancel)
    assert next(pieces) == "one"
    with pytest.raises(RequestCancelledError):
        next(pieces)


def race(one: Ticket) -> None:
    """Cancel and resolve a ticket at the same moment."""
    together = threading.Barrier(2)

    def cancel() -> None:
        together.wait(PATIENCE_S)
        one.cancel()

    def resolve() -> None:
        together.wait(PATIENCE_S)
        one.resolve(answer())

    for thread in [work(cancel), work(resolve)]:
        thread.join()


def test_cancelling_and_resolving_at_once_has_one_winner() -> None:
    for _ in range(300):
        cancels = Cancels()
        one = ticket(cancels)
        race(one)
        assert one.future.done()
        assert len(cancels.threads) == one.future.cancelled()


# -- asyncio


def test_a_task_gets_what_another_thread_resolves() -> None:
    one = ticket()

    async def main() -> Completion:
        work(lambda: one.resolve(answer()))
        return await one.aresult()

    assert asyncio.run(main()) == answer()


def test_a_hundred_tickets_resolved_by_one_thread_reach_their_tasks() -> None:
    tickets = [ticket() for _ in range(100)]

    def resolve_all() -> None:
        for place in reversed(range(100)):
            tickets[place].show(f"piece {place}")
            tickets[place].resolve(answer(str(place)))

    async def read(one: Ticket) -> list[Piece | Completion]:
        return [piece async for piece in one.apieces()]

    async def main() -> tuple[list[Completion], list[list[Piece | Completion]]]:
        waiting = asyncio.gather(*[one.aresult() for one in tickets])
        reading = asyncio.gather(*[read(one) for one in tickets])
        await asyncio.sleep(0)
        work(resolve_all)
        return await waiting, await reading

    results, streams = asyncio.run(main())
    assert [result.text for result in results] == [str(n) for n in range(100)]
    assert streams == [[f"piece {n}", answer(str(n))] for n in range(100)]


def test_a_cancelled_task_cancels_its_request() -> None:
    cancels = Cancels()
    one = ticket(cancels)

    async def main() -> None:
        task = asyncio.create_task(one.aresult())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert one.future.cancelled()
    assert cancels.threads == [threading.current_thread()]


def test_a_task_whose_time_is_up_cancels_its_request() -> None:
    one = ticket()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.aresult(), 0.001)

    asyncio.run(main())
    assert one.future.cancelled()


def test_a_task_learns_that_somebody_else_cancelled_and_is_not_cancelled_itself() -> None:
    one, other = ticket(), ticket()

    async def read() -> None:
        async for _ in other.apieces():
            pass

    async def main() -> None:
        both = asyncio.gather(one.aresult(), read(), return_exceptions=True)
        await asyncio.sleep(0)
        work(one.cancel, other.cancel)
        assert [type(error) for error in await both] == [RequestCancelledError, RequestCancelledError]

    asyncio.run(main())


def test_a_task_gets_the_error_of_the_worker() -> None:
    one = ticket()

    async def main() -> None:
        work(lambda: one.fail(DeadlineExceededError("too late")))
        with pytest.raises(DeadlineExceededError):
            await one.aresult()

    asyncio.run(main())


def test_an_asyncio_stream_gives_pieces_from_before_and_after_it_was_opened() -> None:
    one, completion = ticket(), answer("one two three")
    one.show("one")
    read: list[Piece | Completion] = []

    async def main() -> None:
        async for piece in one.apieces():
            read.append(piece)
            if piece == "one":
                one.show(" two")
                work(lambda: one.show(" three"), lambda: one.resolve(completion))

    asyncio.run(main())
    assert read == ["one", " two", " three", completion]


def test_an_asyncio_stream_of_many_pieces_loses_none_and_keeps_their_order() -> None:
    one = ticket()

    def show_all() -> None:
        for n in range(5000):
            one.show(str(n))
        one.resolve(answer())

    async def main() -> list[Piece | Completion]:
        work(show_all)
        return [piece async for piece in one.apieces()]

    assert asyncio.run(main()) == [*map(str, range(5000)), answer()]


def test_a_task_that_waits_for_a_piece_leaves_the_loop_to_others() -> None:
    one = ticket()
    one.show("one")

    async def read() -> list[Piece | Completion]:
        return [piece async for piece in one.apieces()]

    async def show() -> None:
        for text in (" two", " three"):
            for _ in range(10):
                await asyncio.sleep(0)
            one.show(text)
        one.resolve(answer())

    async def main() -> list[Piece | Completion]:
        pieces, _ = await asyncio.gather(read(), show())
        return pieces

    assert asyncio.run(main()) == ["one", " two", " three", answer()]


def test_an_asyncio_stream_that_fails_gives_its_pieces_and_then_the_error() -> None:
    one = ticket()

    async def main() -> None:
        pieces = one.apieces()
        work(lambda: one.show("one"), lambda: one.fail(DeadlineExceededError("too late")))
        assert await anext(pieces) == "one"
        with pytest.raises(DeadlineExceededError):
            await anext(pieces)

    asyncio.run(main())


def test_an_asyncio_stream_that_is_closed_early_cancels_the_request() -> None:
    cancels = Cancels()
    one = ticket(cancels)
    one.show("one")

    async def main() -> None:
        pieces = one.apieces()
        assert await anext(pieces) == "one"
        await pieces.aclose()

    asyncio.run(main())
    assert one.future.cancelled()
    assert len(cancels.threads) == 1


def test_cancelling_the_task_that_reads_a_stream_cancels_the_request() -> None:
    cancels = Cancels()
    one = ticket(cancels)

    async def main() -> None:
        async def read() -> None:
            async for _ in one.apieces():
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert one.future.cancelled()
    assert len(cancels.threads) == 1


def test_a_loop_that_closes_before_the_worker_resolves_is_no_matter(caplog: pytest.LogCaptureFixture) -> None:
    one, other = ticket(), ticket()
    loop = asyncio.new_event_loop()
    pieces = other.apieces()
    tasks = [loop.create_task(one.aresult()), loop.create_task(anext(pieces))]
    loop.run_until_complete(asyncio.sleep(0))
    assert not any(task.done() for task in tasks)
    loop.close()
    with caplog.at_level(logging.DEBUG, "concurrent.futures"):
        thread = work(
            lambda: other.show("one"),
            lambda: other.resolve(answer("other")),
            lambda: one.resolve(answer()),
        )
        thread.join()
    assert one.result(0) == answer()
    assert other.result(0) == answer("other")
    assert [record for record in caplog.records if record.name == "concurrent.futures"] == []
