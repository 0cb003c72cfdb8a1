"""The host tier: each adapter is read once, memory keeps to its budget, and nobody waits for ever."""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest

from lora_hub_sdk.engine.adapter_file import Unverified, load_factors, open_factors
from lora_hub_sdk.engine.adapter_store import AdapterStore, Held
from lora_hub_sdk.errors import AdapterChangedError, ConfigurationError, EngineClosedError
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Adapter
from tests.support import adapter_at

_PATIENCE = 60.0


class Loads:
    """Reads adapters as ever, counts, and waits at a gate where one was closed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.begun: SimpleQueue[str] = SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def __call__(self, adapter: Adapter) -> Unverified:
        with self._lock:
            self.counts[adapter.digest] += 1
        self.begun.put(adapter.name)
        assert self.gate.wait(_PATIENCE)
        return open_factors(adapter)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture(scope="module")
def crowd(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """200 adapters of several ranks."""
    folder = tmp_path_factory.mktemp("crowd")
    return [
        adapter_at(tiny_adapter(folder / f"{seed}", base, seed=seed, rank=1 + seed % 8), base, id=seed)
        for seed in range(200)
    ]


@pytest.fixture
def own(base: Path, tmp_path: Path) -> list[Adapter]:
    """Three adapters whose files a test may spoil."""
    return [adapter_at(tiny_adapter(tmp_path / f"{seed}", base, seed=seed), base, id=seed) for seed in range(3)]


@pytest.fixture
def open_store() -> Iterator[Callable[..., AdapterStore]]:
    opened: list[AdapterStore] = []

    def open_one(*args: object, **options: object) -> AdapterStore:
        opened.append(AdapterStore(*args, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def spoil(adapter: Adapter) -> None:
    """Change one number in the file."""
    path = adapter.folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def quiet(store: AdapterStore, workers: int = 2) -> None:
    """Wait until the loader threads have done all that they were given so far."""
    together = threading.Barrier(workers)  # no thread gets past it twice
    for job in [store._loaders.submit(together.wait, _PATIENCE) for _ in range(workers)]:
        job.result(_PATIENCE)


def settled(store: AdapterStore, adapters: list[Adapter]) -> None:
    """Wait for the checks of those in memory, so that nothing but callers pins them."""
    held = store.get(adapters)
    held.verify()
    held.release()


def test_factors_come_in_the_order_they_were_asked_for(
    open_store: Callable[..., AdapterStore], crowd: list[Adapter]
) -> None:
    store = open_store(1 << 30)
    first = store.get([crowd[2]])
    asked = [crowd[1], crowd[2], crowd[1], crowd[0]]
    held = store.get(asked)
    held.verify()
    assert [factors.digest for factors in held.factors] == [adapter.digest for adapter in asked]
    assert held.origins == ("disk", "host", "disk", "disk")
    assert held.loaded_s > 0
    for adapter, factors in zip(asked, held.factors, strict=True):
        expected = load_factors(adapter).modules
        assert all(factors.modules[module].a.equal(expected[module].a) for module in expected)
        assert all(factors.modules[module].b.equal(expected[module].b) for module in expected)
    again = store.get(asked)
    assert again.origins == ("host",) * 4
    assert again.loaded_s == 0.0
    for each in (first, held, again):
        each.release()
    assert store.stats().pinned_bytes == 0


def test_nothing_asked_for_is_there_at_once(open_store: Callable[..., AdapterStore]) -> None:
    held = open_store(0).get([])
    held.verify()
    assert (held.factors, held.origins) == ([], ())


def test_what_is_in_memory_is_handed_over_by_the_asking_thread(
    open_store: Callable[..., AdapterStore], crowd: list[Adapter]
) -> None:
    store = open_store(1 << 30)
    store.get(crowd[:2]).release()
    told: list[threading.Thread] = []
    store.prefetch(crowd[:2], lambda _: told.append(threading.current_thread()))
    assert told == [threading.current_thread()]


def test_many_threads_load_each_adapter_once(
    open_store: Callable[..., AdapterStore], crowd: list[Adapter], loads: Loads
) -> None:
    store = open_store(1 << 30, loads)
    together = threading.Barrier(16)

    def ask(number: int) -> None:
        together.wait(_PATIENCE)
        for adapter in random.Random(number).sample(crowd, len(crowd)):
            held = store.get([adapter])
            held.verify()
            held.release()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    assert loads.counts == {adapter.digest: 1 for adapter in crowd}
    stats = store.stats()
    assert (stats.held, stats.loads, stats.evictions, stats.pinned_bytes) == (200, 200, 0, 0)
    assert stats.hits + stats.misses == 16 * 200
    assert stats.bytes == sum(adapter.size_bytes for adapter in crowd)


def test_memory_never_exceeds_the_budget_by_more_than_what_is_in_use(
    open_store: Callable[..., AdapterStore], crowd: list[Adapter], loads: Loads
) -> None:
    budget = sum(adapter.size_bytes for adapter in crowd[:20])
    store = open_store(budget, loads)
    over: list[object] = []

    def look() -> None:
        stats = store.stats()
        if stats.bytes > max(budget, stats.pinned_bytes):
            over.append(stats)

    def ask(number: int) -> None:
        draw = random.Random(number)
        kept: list[Held] = []
        for _ in range(60):
            wanted = draw.choices(crowd, k=draw.randint(1, 6))
            held = store.get(wanted)
            look()
            assert [factors.digest for factors in held.factors] == [adapter.digest for adapter in wanted]
            kept.append(held)
            if draw.random() < 0.1:
                store.discard(draw.choice(crowd).digest)
            while len(kept) > draw.randint(0, 3):
                last = kept.pop(draw.randrange(len(kept)))
                if draw.random() < 0.5:
                    last.verify()
                last.release()
                look()
        for held in kept:
            held.release()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    assert not over
    assert store.stats().evictions > 0
    quiet(store)
    inside = [adapter for adapter in crowd if adapter.digest in store._entries]
    stats = store.stats()
    assert stats.pinned_bytes == 0
    assert stats.bytes == sum(adapter.size_bytes for adapter in inside) <= budget
    assert stats.held == len(inside)
    assert stats.loads == loads.counts.total()


def test_the_least_recently_used_goes_first(open_store: Callable[..., AdapterStore], own: list[Adapter]) -> None:
    assert len({adapter.size_bytes for adapter in own}) == 1
    store = open_store(2 * own[0].size_bytes)
    for number in (0, 1, 0, 2):
        settled(store, [own[number]])
    asked = [store.get([adapter]) for adapter in (own[0], own[2], own[1])]
    assert [held.origins for held in asked] == [("host",), ("host",), ("disk",)]


def test_what_is_in_use_is_never_forgotten(open_store: Callable[..., AdapterStore], own: list[Adapter]) -> None:
    size = own[0].size_bytes
    store = open_store(size)
    held = [store.get([adapter]) for adapter in own]
    for each in held:
        each.verify()
    assert (store.stats().bytes, store.stats().pinned_bytes) == (3 * size, 3 * size)
    for left, each in zip((2, 1, 1), held, strict=True):
        each.release()
        each.release()
        assert store.stats().bytes == left * size
    assert store.stats().pinned_bytes == 0
    assert store.get([own[2]]).origins == ("host",)


def test_an_adapter_beyond_the_budget_passes_through(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    store = open_store(own[0].size_bytes - 1)
    held = store.get([own[0]])
    assert held.factors[0].digest == own[0].digest
    held.verify()
    assert store.stats().bytes == own[0].size_bytes
    held.release()
    assert (store.stats().bytes, store.stats().held) == (0, 0)


@pytest.mark.parametrize("discard_first", [True, False])
def test_memory_is_really_freed_when_the_last_user_lets_go(
    open_store: Callable[..., AdapterStore], own: list[Adapter], discard_first: bool
) -> None:
    memories: list[weakref.ref[object]] = []

    def load(adapter: Adapter) -> Unverified:
        opened = open_factors(adapter)
        memories.append(weakref.ref(opened.weights))
        return opened

    store = open_store(1 << 30, load)
    gc.disable()  # nothing may wait for the collector
    try:
        first, second = store.get([own[0]]), store.get([own[0]])
        first.verify()
        # The thread that loaded has let go of it by the time it does something else.
        quiet(store)
        if discard_first:
            assert store.discard(own[0].digest)
            assert not store.discard(own[0].digest)
        first.release()
        assert [memory() is not None for memory in memories] == [True]
        assert store.stats().bytes == own[0].size_bytes
        second.release()
        if not discard_first:
            assert store.discard(own[0].digest)
        assert store.stats().bytes == store.stats().held == 0
        assert [memory() for memory in memories] == [None]
    finally:
        gc.enable()


def test_an_error_does_not_keep_the_memory_of_what_was_wrong(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    memories: list[weakref.ref[object]] = []

    def load(adapter: Adapter) -> Unverified:
        opened = open_factors(adapter)
        memories.append(weakref.ref(opened.weights))
        return opened

    store = open_store(1 << 30, load)
    spoil(own[0])
    gc.disable()
    try:
        held = store.get([own[0]])
        with pytest.raises(AdapterChangedError) as error:
            held.verify()
        quiet(store)
        held.release()
        assert error.value.__traceback__ is not None
        assert [memory() for memory in memories] == [None]
    finally:
        gc.enable()


def test_a_discarded_adapter_is_read_again_while_others_still_use_it(
    open_store: Callable[..., AdapterStore], own: list[Adapter], loads: Loads
) -> None:
    store = open_store(1 << 30, loads)
    before = store.get([own[0]])
    store.discard(own[0].digest)
    after = store.get([own[0]])
    after.verify()
    after.release()
    before.verify()
    assert loads.counts[own[0].digest] == 2
    assert store.stats().bytes == 2 * own[0].size_bytes
    before.release()
    assert store.stats().bytes == own[0].size_bytes
    assert store.get([own[0]]).origins == ("host",)


def test_the_adapters_of_one_request_load_side_by_side(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    together = threading.Barrier(3)

    def load(adapter: Adapter) -> Unverified:
        together.wait(_PATIENCE)  # none gets past here before all have come
        return open_factors(adapter)

    assert len(open_store(1 << 30, load, workers=3).get(own).factors) == 3


# -- errors ----------------------------------------------------------------------------------------------------


def test_one_missing_file_among_three_is_told_once_and_pins_nothing(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    store = open_store(1 << 30)
    os.unlink(own[1].folder / WEIGHTS_FILE)
    told: SimpleQueue[Held | BaseException] = SimpleQueue()
    store.prefetch([own[0], own[1], own[1], own[2]], told.put)
    assert isinstance(told.get(timeout=_PATIENCE), AdapterChangedError)
    # By now both others are there, too.
    settled(store, [own[0], own[2]])
    assert told.empty()
    stats = store.stats()
    assert (stats.held, stats.bytes, stats.pinned_bytes) == (2, own[0].size_bytes + own[2].size_bytes, 0)


def test_two_bad_adapters_are_one_error(open_store: Callable[..., AdapterStore], own: list[Adapter]) -> None:
    store = open_store(1 << 30)
    for adapter in own[:2]:
        os.unlink(adapter.folder / WEIGHTS_FILE)
    told: SimpleQueue[Held | BaseException] = SimpleQueue()
    store.prefetch(own, told.put)
    assert isinstance(told.get(timeout=_PATIENCE), AdapterChangedError)
    for adapter in own[:2]:
        with pytest.raises(AdapterChangedError, match="gone"):
            store.get([adapter])
    settled(store, own[2:])
    assert told.empty()


def test_a_failed_load_is_not_remembered(open_store: Callable[..., AdapterStore], own: list[Adapter]) -> None:
    store = open_store(1 << 30)
    path = own[0].folder / WEIGHTS_FILE
    path.rename(path.with_suffix(".away"))
    with pytest.raises(AdapterChangedError, match="gone"):
        store.get([own[0]])
    path.with_suffix(".away").rename(path)
    assert store.get([own[0]]).origins == ("disk",)


def test_the_same_content_in_another_folder_is_taken_where_the_first_is_gone(
    open_store: Callable[..., AdapterStore], own: list[Adapter], tmp_path: Path, loads: Loads
) -> None:
    store = open_store(1 << 30, loads)
    gone = replace(own[0], folder=tmp_path / "gone")
    loads.gate.clear()
    told: SimpleQueue[Held | BaseException] = SimpleQueue()
    store.prefetch([gone], told.put)
    store.prefetch([own[0]], told.put)
    loads.gate.set()
    for _ in range(2):
        held = told.get(timeout=_PATIENCE)
        assert isinstance(held, Held)
        held.verify()


def test_changed_numbers_are_found_by_every_holder_and_forgotten(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    store = open_store(1 << 30)
    spoil(own[1])
    first, second = store.get(own), store.get([own[1], own[0]])
    for held in (first, second, second):
        with pytest.raises(AdapterChangedError, match="digest"):
            held.verify()
    third = store.get([own[1]])
    assert third.origins == ("disk",)
    with pytest.raises(AdapterChangedError, match="digest"):
        third.verify()
    fine = store.get([own[0], own[2]])
    assert fine.origins == ("host", "host")
    fine.verify()
    for held in (first, second, third, fine):
        held.release()
    assert store.stats().bytes == own[0].size_bytes + own[2].size_bytes


def test_changed_numbers_are_found_though_nobody_asks(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    store = open_store(1 << 30, workers=1)
    spoil(own[0])
    store.get([own[0]]).release()
    quiet(store, workers=1)
    assert (store.stats().held, store.stats().bytes) == (0, 0)


def test_each_content_is_checked_once_however_many_hold_it(
    open_store: Callable[..., AdapterStore], own: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: Counter[str] = Counter()
    verify = Unverified.verify

    def counted(unverified: Unverified) -> None:
        checked[unverified.adapter.digest] += 1
        verify(unverified)

    monkeypatch.setattr(Unverified, "verify", counted)
    store = open_store(1 << 30)
    held = [store.get(own) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Held.verify, held))
    assert checked == {adapter.digest: 1 for adapter in own}


def test_released_factors_cannot_be_verified(open_store: Callable[..., AdapterStore], own: list[Adapter]) -> None:
    held = open_store(1 << 30).get(own)
    held.release()
    with pytest.raises(RuntimeError, match="released"):
        held.verify()
    assert held.factors == []


def test_what_a_trusted_loader_returns_needs_no_check(
    open_store: Callable[..., AdapterStore], own: list[Adapter]
) -> None:
    spoil(own[0])
    good = open_store(1 << 30, load_factors).get(own[1:])
    good.verify()
    with pytest.raises(AdapterChangedError, match="digest"):
        open_store(1 << 30, load_factors).get(own[:1])


def test_a_callback_that_fails_does_not_stop_the_loader(
    open_store: Callable[..., AdapterStore], own: list[Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(1 << 30, workers=1)

    def fail(_: object) -> None:
        raise ZeroDivisionError("mine")

    store.prefetch([own[0]], fail)
    assert store.get([own[1]]).factors
    assert "mine" in caplog.text


def test_a_budget_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="-1"):
        AdapterStore(-1)


# -- closing ---------------------------------------------------------------------------------------------------


def test_closing_with_loads_in_flight_leaves_nobody_waiting(
    open_store: Callable[..., AdapterStore], own: list[Adapter], crowd: list[Adapter], loads: Loads
) -> None:
    store = open_store(1 << 30, loads)
    kept = store.get(own[:1])
    kept.verify()
    loads.begun.get(timeout=_PATIENCE)
    loads.gate.clear()
    told: SimpleQueue[Held | BaseException] = SimpleQueue()
    # The first is there, two are being read, all others wait in line.
    store.prefetch(own, told.put)
    for adapter in crowd[:50]:
        store.prefetch([adapter, own[1]], told.put)
    for _ in range(2):
        loads.begun.get(timeout=_PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(store.get, [crowd[60]])
        while store.stats().misses < 2 + 2 * 50 + 1 + 1:
            assert not blocked.done()
        store.close()
        with pytest.raises(EngineClosedError):
            blocked.result(_PATIENCE)
    answers = [told.get(timeout=_PATIENCE) for _ in range(51)]
    assert {type(answer) for answer in answers} == {EngineClosedError}
    loads.gate.set()
    store._loaders.shutdown(wait=True)
    assert told.empty()
    assert loads.counts.total() == 3
    stats = store.stats()
    assert (stats.held, stats.bytes, stats.pinned_bytes) == (1, own[0].size_bytes, own[0].size_bytes)
    assert kept.factors[0].digest == own[0].digest
    kept.verify()
    kept.release()
    assert store.stats().bytes == 0


def test_a_closed_store_says_so(own: list[Adapter]) -> None:
    store = AdapterStore(1 << 30)
    store.get(own).release()
    store.close()
    store.close()
    store._loaders.shutdown(wait=True)  # a check that had begun holds what it looks at
    assert store.stats().held == 0
    with pytest.raises(EngineClosedError, match="closed"):
        store.get(own)
    told: list[object] = []
    store.prefetch([], told.append)
    assert [type(answer) for answer in told] == [EngineClosedError]
