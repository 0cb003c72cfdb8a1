"""What goes wrong hits whom it concerns and nobody else, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.engine import worker as worker_module
from lora_hub_sdk.engine.adapter_file import open_factors
from lora_hub_sdk.engine.base_model import BaseModel, load_base_model
from lora_hub_sdk.engine.batch_lora import BatchLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.sampling import TokenSampler
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.engine.ticket import Ticket
from lora_hub_sdk.errors import (
    AdapterChangedError,
    DeadlineExceededError,
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    EngineMemoryError,
    GenerationError,
)
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Adapter, Completion, Sampling
from tests.engine.crowd import (
    PATIENCE_S,
    Tap,
    adapters_in,
    answers_alone,
    assert_nothing_is_left,
    random_route,
    rows_with,
    same,
    wait_for,
)
from tests.support import adapter_at, route_of

LONG = 200


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(resolve_model(base))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return adapters_in(tmp_path_factory.mktemp("adapters"), base, 8)


@pytest.fixture
def open_engine(loaded: BaseModel) -> Iterator[Callable[..., Engine]]:
    """Opens engines and closes them, those that died too."""
    opened: list[Engine] = []

    def open_one(base: BaseModel = loaded, *, load: Callable[[Adapter], Any] = open_factors, **limits: Any) -> Engine:
        opened.append(Engine(base, limits=EngineLimits(**limits), load=load))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close(0.0)


@pytest.fixture
def engine(open_engine: Callable[..., Engine]) -> Engine:
    return open_engine()


@pytest.fixture(scope="module")
def asked(adapters: list[Adapter]) -> list[Request]:
    """Sixteen requests of different lengths and routes."""
    pick = random.Random(2)
    return [
        Request(f"number {place} " + "x" * place, random_route(pick, adapters[:6]), Sampling(4 + place % 7))
        for place in range(16)
    ]


@pytest.fixture(scope="module")
def alone(loaded: BaseModel, asked: list[Request]) -> list[Completion]:
    return answers_alone(loaded, asked)


def long_request(text: str = "go on", **options: Any) -> Request:
    return Request(text, route_of("base"), Sampling(LONG), **options)


def plain(text: str = "hello", count: int = 4, **options: Any) -> Request:
    return Request(text, route_of("base"), Sampling(count), **options)


def with_(adapter: Adapter, count: int = 6, **sampling: Any) -> Request:
    return Request("some prompt", route_of("selection", (adapter, 1.0)), Sampling(count, **sampling))


class Gate:
    """Holds passes up, or loads, until it is opened."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


# -- passes that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 3, 8])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["cuda", "host"])
def test_batches_that_do_not_fit_are_taken_apart(
    engine: Engine, asked: list[Request], alone: list[Completion], room: int, error: Exception
) -> None:
    def full(batch: BatchLora) -> None:
        if len(batch.rows) > room:
            raise error

    tap = Tap(engine, full)
    found = engine.generate(asked)
    assert all(map(same, found, alone))
    assert max(tap.sizes) > room
    assert engine.stats().splits > 0
    assert_nothing_is_left(engine)


def test_memory_that_is_short_for_a_while_only_costs_time(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    pick = random.Random(4)

    def sometimes(batch: BatchLora) -> None:
        if len(batch.rows) > 1 and pick.random() < 0.2:
            raise torch.OutOfMemoryError("now and then")

    tap = Tap(engine, sometimes)
    for _ in range(3):
        assert all(map(same, engine.generate(asked), alone))
    assert engine.stats().splits > 3
    assert len(tap.sizes) > 20


def test_a_row_that_always_fails_fails_by_itself(
    engine: Engine, adapters: list[Adapter], asked: list[Request], alone: list[Completion]
) -> None:
    bad, cause = adapters[7], RuntimeError("a kernel refuses")

    def refuse(batch: BatchLora) -> None:
        if rows_with(batch, bad):
            raise cause

    tap = Tap(engine, refuse)
    tickets = engine.submit_many([*asked[:9], with_(bad), *asked[9:]])
    others = [*tickets[:9], *tickets[10:]]
    with pytest.raises(GenerationError, match="a kernel refuses") as caught:
        tickets[9].result(PATIENCE_S)
    assert caught.value.__cause__ is cause
    assert all(same(ticket.result(PATIENCE_S), right) for ticket, right in zip(others, alone, strict=True))
    # The bisection has an end: 17 rows, so at most 5 passes fail that have it.
    assert engine.stats().splits <= 5
    tap.before = lambda _: None
    assert engine.generate([with_(bad)])[0].usage.completion_tokens > 0
    assert_nothing_is_left(engine)


def test_a_failure_in_the_midst_of_an_answer_does_not_change_it(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    """Rows go on behind what they have said, with their own random numbers, and streams do not repeat it."""
    sampled = [replace(request, sampling=replace(request.sampling, temperature=1.0, seed=7)) for request in asked]
    right = answers_alone(engine.base, sampled)
    tap = Tap(engine)

    def once(batch: BatchLora) -> None:
        if len(tap.sizes) in (5, 8, 12) and len(batch.rows) > 1:
            raise MemoryError

    tap.before = once
    tickets = [engine.submit(request, stream=True) for request in sampled]
    found = [list(ticket.pieces()) for ticket in tickets]
    assert all(same(pieces[-1], answer) for pieces, answer in zip(found, right, strict=True))  # type: ignore[arg-type]
    assert all("".join(map(str, pieces[:-1])) == answer.text for pieces, answer in zip(found, right, strict=True))
    assert engine.stats().splits > 0


def test_what_does_not_fit_even_alone_is_told_so(engine: Engine, asked: list[Request], alone: list[Completion]) -> None:
    def full(_: BatchLora) -> None:
        raise torch.OutOfMemoryError("out of memory")

    tap = Tap(engine, full)
    with pytest.raises(EngineMemoryError, match="even by itself") as caught:
        engine.generate([asked[3]])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    tap.before = lambda _: None
    assert same(engine.generate([asked[3]])[0], alone[3])


def test_a_row_that_was_cancelled_does_not_make_its_neighbour_the_culprit(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    """The pass failed with both rows; that one of them has gone meanwhile does not mean that the other is bad."""
    gate = Gate()
    together: list[int] = []

    def second_piece_fails(batch: BatchLora) -> None:
        if len(batch.rows) == 2:
            together.append(2)
            gate()
            if len(together) > 1:
                raise MemoryError

    engine._worker._piece = 4
    tap = Tap(engine, second_piece_fails)
    running = engine.submit(long_request())
    wait_for(lambda: len(tap.sizes) > 2)
    gone, stays = engine.submit_many(asked[:2])
    assert gate.reached.wait(PATIENCE_S)
    running.cancel()
    gone.cancel()
    gate.open()
    assert same(stays.result(PATIENCE_S), alone[1])
    assert len(together) == 2


# -- one row's own trouble ------------------------------------------------------------------------------------------


def beside(engine: Engine, bad: Request, asked: list[Request], alone: list[Completion]) -> BaseException | None:
    """The error of one request among sixteen that get what they should."""
    tickets = engine.submit_many([*asked[:5], bad, *asked[5:]])
    others = [*tickets[:5], *tickets[6:]]
    assert all(same(ticket.result(PATIENCE_S), right) for ticket, right in zip(others, alone, strict=True))
    return tickets[5].future.exception(PATIENCE_S)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_scores_that_are_no_numbers_end_that_row_alone(
    engine: Engine, adapters: list[Adapter], asked: list[Request], alone: list[Completion], temperature: float
) -> None:
    def poison(batch: BatchLora, logits: Tensor) -> None:
        logits[rows_with(batch, adapters[7])] = torch.nan

    tap = Tap(engine, after=poison)
    error = beside(engine, with_(adapters[7], temperature=temperature, seed=1), asked, alone)
    assert isinstance(error, GenerationError)
    assert "no numbers" in str(error)
    assert max(tap.sizes) > 8
    assert_nothing_is_left(engine)


def test_a_sampler_that_raises_ends_that_row_alone(
    engine: Engine, asked: list[Request], alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = TokenSampler.choose

    def failing(sampler: Any, logits: Tensor, greedy: int, *others: Any) -> int:
        if not sampler._greedy and sampler._generator.initial_seed() == 13:
            raise ZeroDivisionError("sampler")
        return choose(sampler, logits, greedy, *others)

    monkeypatch.setattr(TokenSampler, "choose", failing)
    error = beside(engine, Request("x", route_of("base"), Sampling(5, temperature=1.0, seed=13)), asked, alone)
    assert isinstance(error, GenerationError)
    assert isinstance(error.__cause__, ZeroDivisionError)


class _Stuttering:
    """A tokenizer that cannot write texts of 77 tokens."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._real(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def decode(self, tokens: list[int], **options: Any) -> Any:
        if len(tokens) == 77:
            raise UnicodeError("77 tokens")
        return self._real.decode(tokens, **options)


def test_a_text_that_cannot_be_written_ends_that_row_alone(
    loaded: BaseModel, open_engine: Callable[..., Engine], asked: list[Request], alone: list[Completion]
) -> None:
    stuttering: Any = _Stuttering(loaded.tokenizer)
    engine = open_engine(replace(loaded, tokenizer=stuttering, eos_ids=frozenset()))
    error = beside(engine, plain(count=77), asked, alone)
    assert isinstance(error, GenerationError)
    assert isinstance(error.__cause__, UnicodeError)


# -- adapters that are not what they were ---------------------------------------------------------------------------


@pytest.fixture
def mine(base: Path, tmp_path: Path) -> Adapter:
    return adapter_at(tiny_adapter(tmp_path / "mine", base, seed=50), base, id=50)


@pytest.fixture
def swap(base: Path, mine: Adapter, tmp_path: Path) -> Callable[[str], None]:
    """Puts other content of the same size in the adapter's place, or the registered one back, or takes it away."""
    stored = {
        "right": shutil.copytree(mine.folder, tmp_path / "right"),
        "wrong": tiny_adapter(tmp_path / "wrong", base, seed=51),
    }

    def put(what: str) -> None:
        shutil.rmtree(mine.folder, ignore_errors=True)
        if what in stored:
            shutil.copytree(stored[what], mine.folder)

    return put


@pytest.mark.parametrize("what", ["wrong", "missing"])
def test_changed_files_end_only_the_requests_that_use_them(
    engine: Engine,
    mine: Adapter,
    swap: Callable[[str], None],
    asked: list[Request],
    alone: list[Completion],
    what: str,
) -> None:
    (right,) = answers_alone(engine.base, [with_(mine)])
    for _ in range(3):
        swap(what)
        error = beside(engine, with_(mine), asked, alone)
        assert isinstance(error, AdapterChangedError)
        swap("right")
        assert same(engine.generate([with_(mine)])[0], right)
        engine.forget(mine.digest)
    assert_nothing_is_left(engine)


def test_wrong_content_of_a_request_that_left_early_is_used_for_nobody(
    engine: Engine, mine: Adapter, swap: Callable[[str], None]
) -> None:
    """It lies in the pool unproven: whoever would have found that out has gone."""
    (right,) = answers_alone(engine.base, [with_(mine)])
    swap("wrong")
    gate = Gate()

    def hold(batch: BatchLora) -> None:
        if rows_with(batch, mine):
            gate()

    # Beside a row that decodes, prompts are read in pieces: here it is cancelled between two of them.
    engine._worker._piece = 4
    tap = Tap(engine, hold)
    running = engine.submit(long_request())
    wait_for(lambda: len(tap.sizes) > 2)
    gone = engine.submit(with_(mine))
    assert gate.reached.wait(PATIENCE_S)
    gone.cancel()
    gate.open()
    wait_for(lambda: engine.stats().requests["cancelled"] == 1)
    assert mine.digest in engine._worker._pool
    running.cancel()
    wait_for(lambda: engine.stats().host.adapters == 0)  # the store has found it out and forgotten it
    swap("right")
    assert same(engine.generate([with_(mine)])[0], right)


def test_a_right_copy_never_gets_the_rows_of_a_wrong_one_that_still_runs(
    open_engine: Callable[..., Engine], mine: Adapter, swap: Callable[[str], None]
) -> None:
    """Two requests read the same adapter one after the other, and its files were put right in between."""
    engine, gate = open_engine(gather_s=0.0), Gate()
    (right,) = answers_alone(engine.base, [with_(mine)])
    swap("wrong")

    def hold(batch: BatchLora) -> None:
        if rows_with(batch, mine):
            gate()

    engine._worker._piece = 4
    tap = Tap(engine, hold)
    running = engine.submit(long_request())
    wait_for(lambda: len(tap.sizes) > 2)
    first = engine.submit(with_(mine))
    assert gate.reached.wait(PATIENCE_S)
    swap("right")
    engine.forget(mine.digest)
    second = engine.submit(with_(mine))
    wait_for(lambda: engine.stats().host.adapters == 2)
    gate.open()
    assert isinstance(first.future.exception(PATIENCE_S), AdapterChangedError)
    running.cancel()
    assert same(second.result(PATIENCE_S), right)
    assert_nothing_is_left(engine)


def test_a_load_that_fails_is_tried_again_by_the_next_request(
    open_engine: Callable[..., Engine], mine: Adapter, asked: list[Request], alone: list[Completion]
) -> None:
    broken = [OSError("the disk"), AdapterChangedError("gone")]

    def load(adapter: Adapter) -> Any:
        if adapter.digest == mine.digest and broken:
            raise broken.pop()
        return open_factors(adapter)

    engine = open_engine(load=load)
    assert isinstance(beside(engine, with_(mine), asked, alone), AdapterChangedError)
    assert isinstance(beside(engine, with_(mine), asked, alone), OSError)
    assert beside(engine, with_(mine), asked, alone) is None
    assert_nothing_is_left(engine)


# -- the engine's own death -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["offer", "ready", "admit", "expired", "withdraw", "failed"])
def test_when_the_worker_dies_nobody_waits_for_it(
    open_engine: Callable[..., Engine], adapters: list[Adapter], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(max_rows=4)
    worker: Any = engine._worker
    real, armed = getattr(worker._scheduler, where), threading.Event()
    cause = RuntimeError("a bug")

    def die(*args: Any, **options: Any) -> Any:
        if armed.is_set():
            raise cause
        return real(*args, **options)

    monkeypatch.setattr(worker._scheduler, where, die)
    gate, first = Gate(), threading.Event()

    def hold(batch: BatchLora) -> None:
        if not first.is_set():
            return
        gate()
        if where == "failed":
            raise MemoryError

    Tap(engine, hold)
    first.set()
    running = [engine.submit(long_request(), stream=place > 1) for place in range(4)]
    assert gate.reached.wait(PATIENCE_S)

    endings: list[BaseException | None] = []

    def listen(ticket: Ticket) -> None:
        try:
            list(ticket.pieces())
        except BaseException as error:
            endings.append(error)

    async def many() -> list[object]:
        asking = asyncio.gather(
            *(engine.agenerate([with_(adapters[place % 8])]) for place in range(6)), return_exceptions=True
        )
        await asyncio.sleep(0.02)
        armed.set()
        gate.open()
        return list(await asking)

    threads = [threading.Thread(target=listen, args=(ticket,)) for ticket in running[2:]]
    for thread in threads:
        thread.start()
    waiting = engine.submit_many([plain(str(place)) for place in range(10)])
    waiting[0].cancel()
    endings += asyncio.run(asyncio.wait_for(many(), PATIENCE_S))  # type: ignore[arg-type]
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for ticket in (*running[:2], *waiting[1:]):
        endings.append(ticket.future.exception(PATIENCE_S))
    assert len(endings) == 2 + 6 + 2 + 9
    assert all(isinstance(error, EngineCrashedError) and error.__cause__ is cause for error in endings), endings
    assert len({id(error) for error in endings}) == len(endings)  # each has a traceback of its own
    with pytest.raises(EngineCrashedError, match="a bug"):
        engine.submit(plain())
    with pytest.raises(EngineCrashedError):
        engine.generate([plain()])
    engine.close()
    assert engine.stats().waiting == engine.stats().running == 0
    wait_for(lambda: worker._store.stats().pinned_bytes == 0)


# -- closing --------------------------------------------------------------------------------------------------------


def test_closing_answers_what_waits_runs_and_loads(
    open_engine: Callable[..., Engine], asked: list[Request], alone: list[Completion]
) -> None:
    loading = Gate()

    def load(adapter: Adapter) -> Any:
        loading()
        return open_factors(adapter)

    engine = open_engine(load=load, max_rows=2)
    tickets = engine.submit_many(asked)
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_for(lambda: engine._worker._closed)
    with pytest.raises(EngineClosedError):
        engine.submit(plain())
    loading.open()
    assert all(same(ticket.result(PATIENCE_S), right) for ticket, right in zip(tickets, alone, strict=True))
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
def test_closing_with_a_timeout_gives_the_rest_up(
    open_engine: Callable[..., Engine], adapters: list[Adapter], timeout_s: float
) -> None:
    loading = Gate()

    def load(adapter: Adapter) -> Any:
        loading()
        return open_factors(adapter)

    engine = open_engine(load=load, max_rows=2, gather_s=0.0)
    gate = Gate()
    Tap(engine, gate)
    tickets = engine.submit_many([long_request() for _ in range(6)])
    assert gate.reached.wait(PATIENCE_S)
    tickets += engine.submit_many([with_(adapter) for adapter in adapters])
    closing = threading.Thread(target=engine.close, args=(timeout_s,))
    closing.start()
    # The pass that runs is not broken off.
    wait_for(lambda: engine._worker._inbox.qsize() > 2)
    gate.open()
    for ticket in tickets:
        assert isinstance(ticket.future.exception(PATIENCE_S), EngineClosedError)
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    loading.open()
    assert_nothing_is_left(engine)


def test_any_number_of_threads_may_close(engine: Engine, asked: list[Request], alone: list[Completion]) -> None:
    tickets = engine.submit_many(asked)
    closing = [threading.Thread(target=engine.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert all(same(ticket.result(0), right) for ticket, right in zip(tickets, alone, strict=True))


def test_a_callback_of_a_ticket_may_close_and_ask(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    """It runs in the engine's own thread, which cannot wait for itself; the others are answered all the same."""
    refused: list[BaseException] = []

    def close(_: object) -> None:
        engine.close()
        try:
            engine.submit(plain())
        except EngineClosedError as error:
            refused.append(error)

    tickets = engine.submit_many(asked)
    tickets[4].future.add_done_callback(close)
    assert all(same(ticket.result(PATIENCE_S), right) for ticket, right in zip(tickets, alone, strict=True))
    assert len(refused) == 1
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("timeout_s", [None, 0.02])
def test_a_request_that_meets_the_end_is_refused_or_answered(
    open_engine: Callable[..., Engine], adapters: list[Adapter], timeout_s: float | None
) -> None:
    late = 0
    for turn in range(12):
        engine = open_engine()
        taken: list[Ticket] = []
        refused: list[int] = []
        start = threading.Barrier(9)

        def ask(engine: Engine, start: threading.Barrier, taken: list[Ticket], refused: list[int]) -> None:
            start.wait()
            for place in range(400):
                try:
                    taken.append(engine.submit(with_(adapters[place % 8], 2)))
                except EngineClosedError:
                    refused.append(place)
                    return

        threads = [threading.Thread(target=ask, args=(engine, start, taken, refused)) for _ in range(8)]
        for thread in threads:
            thread.start()
        start.wait()
        threading.Event().wait(0.002 * turn)
        engine.close(timeout_s)
        for thread in threads:
            thread.join(PATIENCE_S)
        late += len(refused)
        assert not wait([ticket.future for ticket in taken], PATIENCE_S).not_done
        errors = [ticket.future.exception() for ticket in taken]
        assert all(error is None or (timeout_s and isinstance(error, EngineClosedError)) for error in errors), errors
        assert_nothing_is_left(engine)
    assert late > 12


# -- idle and forgotten ---------------------------------------------------------------------------------------------


def test_an_idle_thread_ends_and_the_next_request_starts_another(
    engine: Engine, asked: list[Request], alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_LINGER_S", 0.01)
    seen = set()
    for _ in range(3):
        assert all(map(same, engine.generate(asked), alone))
        seen.add(engine._worker._thread)
        wait_for(lambda: engine._worker._thread is None)
    seen.discard(None)
    assert len(seen) == 3


def test_requests_that_meet_an_ending_thread_are_answered(
    open_engine: Callable[..., Engine], adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_LINGER_S", 0.001)
    engine = open_engine(gather_s=0.0)
    pick = random.Random(1)
    starts = set()
    for place in range(150):
        ticket = engine.submit(with_(adapters[place % 8], 1) if place % 2 else plain(count=1))
        starts.add(engine._worker._thread)
        assert ticket.result(PATIENCE_S).usage.completion_tokens == 1
        threading.Event().wait(pick.random() * 0.004)
    assert len(starts) > 5
    assert_nothing_is_left(engine)


def test_a_forgotten_engine_leaves_no_thread_and_no_memory(
    loaded: BaseModel, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_LINGER_S", 0.05)
    before = threading.active_count()
    engine = Engine(loaded)
    engine.generate([with_(adapter) for adapter in adapters])
    worker: Any = engine._worker
    left = [weakref.ref(part) for part in (engine, worker, worker._pool, worker._store, worker._running)]
    tables = [weakref.ref(table.a) for table in worker._pool.tables.values()]
    thread = worker._thread
    del engine, worker
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    gc.collect()
    assert [part() for part in left] == [None] * 5
    assert [table() for table in tables] == [None] * len(tables)
    wait_for(lambda: threading.active_count() <= before)


# -- time -----------------------------------------------------------------------------------------------------------


def test_too_late_is_too_late_wherever_it_waits(open_engine: Callable[..., Engine], adapters: list[Adapter]) -> None:
    loading = Gate()

    def load(adapter: Adapter) -> Any:
        loading()
        return open_factors(adapter)

    engine = open_engine(load=load, max_rows=1, gather_s=0.0)
    gate = Gate()
    Tap(engine, gate)
    running = engine.submit(long_request(timeout_s=0.2))
    assert gate.reached.wait(PATIENCE_S)
    waiting = engine.submit(plain(timeout_s=0.1))
    loads = engine.submit(replace(with_(adapters[0]), timeout_s=0.1))
    patient = engine.submit(plain())
    threading.Event().wait(0.25)
    gate.open()
    for ticket in (running, waiting, loads):
        assert isinstance(ticket.future.exception(PATIENCE_S), DeadlineExceededError)
    # The only place is free again.
    assert patient.result(PATIENCE_S).usage.completion_tokens == 4
    assert engine.stats().requests["deadline"] == 3
    loading.open()
    assert_nothing_is_left(engine)


def test_an_answer_in_time_is_an_answer(engine: Engine, asked: list[Request], alone: list[Completion]) -> None:
    found = engine.generate([replace(request, timeout_s=PATIENCE_S) for request in asked])
    assert all(map(same, found, alone))


# -- many of them ---------------------------------------------------------------------------------------------------


def test_who_comes_when_too_many_wait_is_refused(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(max_rows=2, max_waiting=5, gather_s=0.0)
    gate = Gate()
    Tap(engine, gate)
    running = engine.submit_many([plain() for _ in range(2)])
    assert gate.reached.wait(PATIENCE_S)
    waiting = engine.submit_many([plain() for _ in range(5)])
    with pytest.raises(EngineBusyError, match="max_waiting"):
        engine.submit(plain())
    assert engine.stats().waiting == 5
    waiting[0].cancel()
    gate.open()
    wait_for(lambda: engine.stats().waiting == 0)
    assert len([ticket.result(PATIENCE_S) for ticket in (*running, *waiting[1:])]) == 6
    assert engine.stats().requests["busy"] == 1
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("way", ["generate", "on_text", "agenerate"])
def test_one_call_may_ask_more_than_may_wait_even_beside_others(
    open_engine: Callable[..., Engine], asked: list[Request], alone: list[Completion], way: str
) -> None:
    engine = open_engine(max_rows=4, max_waiting=20)
    over = threading.Event()
    others: list[BaseException] = []

    def another() -> None:
        while not over.is_set():
            try:
                engine.generate([plain(count=2)] * 6)
            except EngineBusyError:
                threading.Event().wait(0.001)
            except BaseException as error:
                others.append(error)
                raise

    threads = [threading.Thread(target=another) for _ in range(2)]
    for thread in threads:
        thread.start()
    texts = [""] * 128

    def note(place: int, text: str) -> None:
        texts[place] += text

    try:
        if way == "agenerate":
            found = asyncio.run(engine.agenerate(asked * 8))
        else:
            found = engine.generate(asked * 8, on_text=note if way == "on_text" else None)
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert all(map(same, found, alone * 8))
    assert way != "on_text" or texts == [answer.text for answer in alone * 8]
    assert not others


def test_a_single_request_need_not_wait_for_a_large_call(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(max_rows=8)
    large = [plain(str(place), 8) for place in range(300)]
    tickets = engine.submit_many(large)
    wait_for(lambda: any(ticket.future.done() for ticket in tickets))
    ended: list[int] = []
    single = engine.submit(plain("me too", 8))
    single.future.add_done_callback(lambda _: ended.append(sum(ticket.future.done() for ticket in tickets)))
    before = sum(ticket.future.done() for ticket in tickets)
    single.result(PATIENCE_S)
    wait_for(lambda: bool(ended))
    # At most those that ran already, and a batch beside it.
    assert ended[0] - before <= 32
    assert not wait([ticket.future for ticket in tickets], PATIENCE_S).not_done


def test_a_short_request_joins_long_ones_within_a_few_steps(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine()
    tap = Tap(engine)
    long = engine.submit_many([long_request(f"tale {place}") for place in range(15)])
    wait_for(lambda: 15 in tap.sizes)
    asked_at: list[int] = []
    first_at: list[int] = []
    halt = threading.Event()

    def note(_: BatchLora) -> None:
        if len(tap.sizes) == 40:  # in the midst of a pass of theirs
            ticket = engine.submit(plain("me", 5), stream=True)
            asked_at.append(engine.stats().steps)
            threading.Thread(target=listen, args=(ticket,)).start()

    def listen(ticket: Ticket) -> None:
        assert isinstance(list(ticket.pieces())[-1], Completion)
        halt.set()

    real_show = Ticket.show

    def show(ticket: Ticket, text: str) -> None:
        if not first_at:
            first_at.append(engine.stats().steps)
        real_show(ticket, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ticket, "show", show)
        tap.before = note
        assert halt.wait(PATIENCE_S)
    assert first_at[0] - asked_at[0] <= 3
    assert not wait([ticket.future for ticket in long], PATIENCE_S).not_done
