"""The engines of a hub: each loaded when it is asked for, without holding up the others; put out for want of room.

Where the models of all engines together have a bound, a load waits its turn, closes engines that were not used for
longest, and those that are busy once they have answered. Whoever asks meanwhile for one of these has it loaded again.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import ref

from lora_hub_sdk.errors import ConfigurationError, DeadlineExceededError, EngineClosedError

if TYPE_CHECKING:
    from torch import nn

    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.engine import Engine

Key = tuple[str, "ModelSettings"]
T = TypeVar("T")

#: An engine that has to go waits so long for a task that was given it and hands nothing in: the thread of its event
#: loop may be blocked by whoever waits for the room. The task then gets the engine once more, and more time.
_PATIENCE_S: Final = 1.0
_MOST_PATIENCE_S: Final = 64.0
_LOOK_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Making:
    """Which engine, and how it is made. ``size`` estimates the bytes of its model; asked only where there is a bound.

    ``key`` is the canonical name of the base model and how it is loaded.
    """

    key: Key
    make: Callable[[], Engine]
    size: Callable[[], int]


@dataclass(eq=False, slots=True)
class _Entry:
    """An engine and those who use it: callers that wait for it, or are handing their requests in."""

    key: Key
    future: Future[Engine] = field(default_factory=Future)
    size_bytes: int = 0
    threads: int = 0
    tasks: int = 0
    patience_s: float = _PATIENCE_S
    used: int = 0

    @property
    def engine(self) -> Engine | None:
        """None until it is there."""
        loaded = self.future.done() and self.future.exception() is None
        return self.future.result() if loaded else None

    @property
    def busy(self) -> bool:
        """Whether somebody uses it, or waits for its answers."""
        if self.threads or self.tasks or self.engine is None:
            return True
        stats = self.engine.stats()
        return bool(stats.waiting or stats.running)


class Engines:
    """Engines by the canonical name of their base model and how it is loaded. Thread-safe.

    Args:
        base_bytes: memory for the models of all engines together; None is no bound.
    """

    def __init__(self, base_bytes: int | None = None) -> None:
        self._budget = base_bytes
        self._changed = threading.Condition()
        self._entries: dict[Key, _Entry] = {}
        #: No longer given to anybody; they answer what they were handed.
        self._leaving: list[_Entry] = []
        #: Loads that need room, in the order in which they get it.
        self._turns: deque[_Entry] = deque()
        self._clock = count(1)
        self._closed = False

    # -- using them ---------------------------------------------------------------------------------------------------

    def use(self, making: Making, do: Callable[[Engine], T], left_s: Callable[[], float | None] = lambda: None) -> T:
        """What ``do`` makes of the engine, which stays for as long as that takes.

        The engine is made by a thread of its own where there is none; all who ask meanwhile wait for that one. ``do``
        is called again with another engine where this one was closed first.

        Args:
            left_s: seconds that are left, asked whenever there is something to wait for.

        Raises:
            DeadlineExceededError: it was not there in time; it goes on being made.
            ConfigurationError: its model alone needs more than all models may.
            EngineClosedError: this was closed.
            Whatever ``make`` raises, whoever asks after that tries again; whatever ``do`` raises.
        """
        while True:
            entry = self._join(making, threads=1)
            try:
                return do(_waited(entry, left_s()))
            except EngineClosedError:
                if not self._may_ask_again(entry):
                    raise
            finally:
                self._leave(entry, threads=1)

    async def ause(
        self,
        making: Making,
        do: Callable[[Engine], Awaitable[T]],
        left_s: Callable[[], float | None] = lambda: None,
    ) -> T:
        """As ``use``, without blocking the event loop."""
        patience_s = _PATIENCE_S
        while True:
            entry = self._join(making, tasks=1, patience_s=patience_s)
            try:
                return await do(await _awaited(entry, left_s()))
            except EngineClosedError:
                if not self._may_ask_again(entry):
                    raise
            finally:
                self._leave(entry, tasks=1)
            patience_s = min(2 * patience_s, _MOST_PATIENCE_S)

    # -- seeing them --------------------------------------------------------------------------------------------------

    def loaded(self) -> list[Engine]:
        """Those that are there, in the order in which they were first asked for; those that have to go come first."""
        with self._changed:
            return [entry.engine for entry in self._all() if entry.engine is not None]

    def staying(self) -> list[Key]:
        """The keys of those that are there and do not have to go."""
        with self._changed:
            return [key for key, entry in self._entries.items() if entry.engine is not None]

    # -- ends ---------------------------------------------------------------------------------------------------------

    def unload(self, name: str, timeout_s: float | None = None) -> bool:
        """Close the engines of a base model once they have answered, and free their memory.

        One that is loading is waited for. Whoever asks for the model meanwhile has it loaded again afterwards.

        Args:
            name: canonical.

        Returns:
            Whether there was one.

        Raises:
            DeadlineExceededError: it took longer; it goes on, and the memory is freed once all is answered.
        """
        with self._changed:
            asked = [entry for entry in self._all() if entry.key[0] == name]
        # A thread of its own, as this one may give up earlier.
        thread = threading.Thread(target=self._unload, args=(asked,), name="lora-hub-unload-base")
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            raise DeadlineExceededError(
                f"base model {name!r} was not unloaded within timeout_s={timeout_s}, as it has requests to answer; it "
                "goes once they are answered"
            )
        return bool(asked)

    def close(self, timeout_s: float | None = None) -> None:
        """Have all engines answer what they were handed, and make no more. May be called twice.

        Args:
            timeout_s: what is not answered by then, in any of them, fails with EngineClosedError.
        """
        until = None if timeout_s is None else monotonic() + timeout_s
        with self._changed:
            self._closed = True
            for entry in self._entries.values():
                if not entry.future.done():
                    entry.future.set_exception(_closed())
            self._changed.notify_all()
        for engine in self.loaded():
            engine.close(None if until is None else max(until - monotonic(), 0.0))

    # -- callers ------------------------------------------------------------------------------------------------------

    def _join(self, making: Making, *, threads: int = 0, tasks: int = 0, patience_s: float = 0.0) -> _Entry:
        """The entry of an engine, which counts this caller from now on."""
        with self._changed:
            if self._closed:
                raise _closed()
            entry = self._entries.get(making.key)
            if entry is None:
                entry = self._entries[making.key] = _Entry(making.key)
                threading.Thread(target=self._make, args=(making, entry), name="lora-hub-load-base").start()
            entry.threads += threads
            entry.tasks += tasks
            entry.patience_s = max(entry.patience_s, patience_s)
            entry.used = next(self._clock)
            return entry

    def _leave(self, entry: _Entry, *, threads: int = 0, tasks: int = 0) -> None:
        with self._changed:
            entry.threads -= threads
            entry.tasks -= tasks
            entry.used = next(self._clock)
            if entry in self._leaving:
                self._changed.notify_all()

    def _may_ask_again(self, entry: _Entry) -> bool:
        """Whether an engine that was found closed can be had anew."""
        with self._changed:
            if not self._closed and self._entries.get(entry.key) is entry:  # its user closed it, not this
                del self._entries[entry.key]
                self._changed.notify_all()
            return not self._closed

    # -- loading ------------------------------------------------------------------------------------------------------

    def _make(self, making: Making, entry: _Entry) -> None:
        try:
            self._find_room(entry, self._estimate(making))
            engine = making.make()
            if self._budget is not None:
                self._check_size(entry, engine)
        except BaseException as error:
            self._fail(entry, error)
            return
        with self._changed:
            closed = self._closed
            if not closed:
                entry.future.set_result(engine)
            self._changed.notify_all()
        if closed:
            engine.close()
            return
        del engine
        # It may be larger than its files told. Nobody waits for that: it is there now, and others have to go.
        with suppress(EngineClosedError):
            self._find_room(entry, entry.size_bytes)

    def _estimate(self, making: Making) -> int:
        if self._budget is None:
            return 0
        size = making.size()
        if size > self._budget:
            raise _too_large(making.key[0], "by its files", size, self._budget)
        return size

    def _check_size(self, entry: _Entry, engine: Engine) -> None:
        assert self._budget is not None
        size = engine.base.size_bytes + engine.base.packed_bytes
        if size > self._budget:
            engine.close()
            raise _too_large(entry.key[0], "now that it was loaded", size, self._budget)
        with self._changed:
            entry.size_bytes = size
            self._changed.notify_all()

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        with self._changed:
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
            if not entry.future.done():
                entry.future.set_exception(error)
            self._changed.notify_all()

    # -- room ---------------------------------------------------------------------------------------------------------

    def _find_room(self, entry: _Entry, size: int) -> None:
        """Return once an engine's ``size`` bytes fit beside all others.

        Loads take turns, and only the one whose turn it is has others closed: what one frees no other takes.

        Raises:
            EngineClosedError: this was closed meanwhile.
        """
        with self._changed:
            self._turns.append(entry)
        try:
            while (others := self._in_the_way(entry, size)) is not None:
                self._put_out(others)
        finally:
            with self._changed:
                self._turns.remove(entry)
                self._changed.notify_all()

    def _in_the_way(self, entry: _Entry, size: int) -> list[_Entry] | None:
        """Waits for this load's turn, and for something to do: the engines that have to go, None where it fits."""
        with self._changed:
            while True:
                if self._closed:
                    raise _closed()
                if self._entries.get(entry.key) is not entry:  # it was there already, and has to go by now
                    return None
                same = any(other.key == entry.key for other in self._leaving)
                if self._turns[0] is entry and not same:
                    excess = self._excess(entry, size)
                    going = sum(other.size_bytes for other in self._leaving)
                    if excess <= 0:
                        entry.size_bytes = size
                        return None
                    others = self._oldest(excess - going, entry)
                    if others:
                        self._part_with(others)
                        return others
                self._changed.wait()

    def _excess(self, entry: _Entry, size: int) -> int:
        if self._budget is None:
            return 0
        return sum(other.size_bytes for other in self._all() if other is not entry) + size - self._budget

    def _oldest(self, excess: int, entry: _Entry) -> list[_Entry]:
        """Engines of so many bytes: those first that have nothing to do, and were used longest ago.

        None where those that are there do not suffice; others are loading or going then.
        """
        there = [other for other in self._entries.values() if other is not entry and other.engine is not None]
        chosen: list[_Entry] = []
        for other in sorted(there, key=lambda one: (one.busy, one.used)):
            if sum(one.size_bytes for one in chosen) < excess:
                chosen.append(other)
        total = sum(one.size_bytes for one in chosen)
        if total < excess:
            return []
        for other in list(chosen):  # small ones that the large one behind them has made superfluous
            if total - other.size_bytes >= excess:
                chosen.remove(other)
                total -= other.size_bytes
        return chosen

    # -- going --------------------------------------------------------------------------------------------------------

    def _unload(self, asked: Collection[_Entry]) -> None:
        while True:
            with self._changed:
                there = [entry for entry in asked if self._entries.get(entry.key) is entry]
                if self._closed or not (there or any(entry in self._leaving for entry in asked)):
                    return
                ready = [entry for entry in there if entry.engine is not None]
                self._part_with(ready)
                if not ready:  # it is loading, or somebody else is putting it out
                    self._changed.wait()
            self._put_out(ready)

    def _part_with(self, entries: Collection[_Entry]) -> None:
        """Give these to nobody any more."""
        for entry in entries:
            del self._entries[entry.key]
            self._leaving.append(entry)

    def _put_out(self, entries: Collection[_Entry]) -> None:
        """Have engines answer what they were handed, and free their memory."""
        for entry in entries:
            self._wait_for_callers(entry)
            engine = entry.engine
            assert engine is not None
            engine.close()
            model, on_gpu = ref(engine.base.model), engine.base.device.type == "cuda"
            del engine
            entry.future = Future()  # a caller whose event loop is blocked still has the entry
            entry.future.set_exception(EngineClosedError("this base model was unloaded; ask for it again"))
            _free_memory(model, on_gpu=on_gpu)
            with self._changed:
                self._leaving.remove(entry)
                self._changed.notify_all()

    def _wait_for_callers(self, entry: _Entry) -> None:
        """Until everybody who was given an engine has handed in what they want of it."""
        with self._changed:
            since = monotonic()
            while (entry.threads or entry.tasks) and not self._closed:
                stats = None if entry.engine is None else entry.engine.stats()
                if entry.threads or (stats is not None and (stats.waiting or stats.running)):
                    since = monotonic()
                if monotonic() - since >= entry.patience_s:
                    return
                self._changed.wait(_LOOK_S)

    def _all(self) -> list[_Entry]:
        return [*self._leaving, *self._entries.values()]


def _waited(entry: _Entry, timeout_s: float | None) -> Engine:
    future = entry.future
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():  # an error of the loading itself, or just in time
            return future.result()
        raise _too_late(entry.key, timeout_s) from None


async def _awaited(entry: _Entry, timeout_s: float | None) -> Engine:
    future = entry.future
    if future.done():
        return future.result()
    try:
        async with asyncio.timeout(timeout_s) as limit:
            # Others wait for it too.
            return await asyncio.shield(asyncio.wrap_future(future))
    except TimeoutError:
        if limit.expired():
            raise _too_late(entry.key, timeout_s) from None
        raise


def _free_memory(model: ref[nn.Module], *, on_gpu: bool) -> None:
    if model() is not None:  # something in a cycle has it, or a caller who was given the engine
        gc.collect()
    if on_gpu:
        import torch

        torch.cuda.empty_cache()  # else it does not count as free where the next engine sees what it may take
    # glibc keeps freed blocks of less than 32 MB, which most weights are: a model's memory stayed with the process.
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _too_late(key: Key, timeout_s: float | None) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"base model {key[0]!r} was not loaded within timeout_s={timeout_s}; it goes on loading, so ask again"
    )


def _too_large(name: str, found: str, size: int, budget: int) -> ConfigurationError:
    return ConfigurationError(
        f"base model {name!r} takes {size:,} bytes {found}, all base models together may take {budget:,} "
        "(EngineSettings.base_bytes); raise that, or load it quantized or in a smaller dtype (ModelSettings)"
    )


def _closed() -> EngineClosedError:
    return EngineClosedError("this hub was closed; open it again")
