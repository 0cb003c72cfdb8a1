"""The host tier: adapters' factors in memory, shared by all requests, within a budget of bytes."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.engine.adapter_file import Unverified, open_factors
from lora_hub_sdk.errors import ConfigurationError, EngineClosedError
from lora_hub_sdk.types import Adapter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The host tier at one moment, and what it did since it was opened.

    Attributes:
        held: adapters in memory, among them those that were discarded and are still in use.
        bytes: memory of the adapters held.
        pinned_bytes: the part of it that is in use and cannot be freed now.
        hits: adapters that were in memory when they were asked for.
        misses: adapters that had to be waited for.
        loads: adapters that were read; fewer than the misses where several requests waited for one.
        evictions: adapters that were forgotten to keep the budget.
        load_s: seconds that reading them took, summed over the loader threads.
    """

    held: int
    bytes: int
    pinned_bytes: int
    budget_bytes: int
    hits: int
    misses: int
    loads: int
    evictions: int
    load_s: float


@dataclass(eq=False, slots=True)
class _Entry:
    """One content: being loaded (no ``factors`` yet), in use (``pins``), or idle. Its loader has the first pin."""

    digest: str
    #: The same content may lie in several folders, and some of them may be gone.
    sources: list[Adapter]
    factors: AdapterFactors | None = None
    size: int = 0
    pins: int = 1
    waiting: list[_Order] = field(default_factory=list)
    unverified: Unverified | None = None
    error: BaseException | None = None
    checking: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False, slots=True)
class _Order:
    """One call of ``prefetch`` that waits for ``missing`` more contents."""

    entries: list[_Entry]
    on_done: Callable[[Held | BaseException], None]
    began: float
    origins: list[Literal["host", "disk"]] = field(default_factory=list)
    missing: int = 0


class Held:
    """Factors that stay in memory until ``release``, which must be called in any case. Thread-safe.

    Attributes:
        factors: of the adapters asked for, in their order; empty after ``release``.
        origins: where each was found: "host" in memory, "disk" where it had to be waited for.
        loaded_s: seconds that were waited for.
    """

    def __init__(self, store: AdapterStore, order: _Order, loaded_s: float) -> None:
        self.factors = [entry.factors for entry in order.entries if entry.factors is not None]
        self.origins = tuple(order.origins)
        self.loaded_s = loaded_s
        self._store = store
        self._entries = order.entries
        self._released = False

    def verify(self) -> None:
        """Wait until all of these are known to be what was registered, and help where nobody has begun to check.

        Nothing made with the factors may be delivered before. Call it before ``release``.

        Raises:
            AdapterChangedError: one of them is something else; the store has forgotten it.
            RuntimeError: they were released.
        """
        if self._released:
            raise RuntimeError("these factors were released; verify them before")
        for entry in self._entries:
            self._store._verify(entry)
            if entry.error is not None:
                raise entry.error

    def release(self) -> None:
        """Let the store free them. May be called twice."""
        with self._store._lock:
            if not self._released:
                self._released = True
                self.factors = []
                for entry in self._entries:
                    self._store._unpin(entry)


class AdapterStore:
    """Loads adapters on threads of its own, each content once however many ask for it, and keeps the last used.

    Factors in use are never freed. Beside them the store keeps what fits within the budget, so it holds no more than
    the larger of the two: the budget, or what is in use. Files that are just being read come on top, one per thread.
    A load that failed is not remembered.

    Args:
        budget_bytes: memory for factors; 0 keeps only what is in use.
        load: reads an adapter. What it returns is trusted, unless it is ``Unverified``.
        workers: loader threads.

    Raises:
        ConfigurationError: a budget below 0.
    """

    def __init__(
        self,
        budget_bytes: int,
        load: Callable[[Adapter], AdapterFactors | Unverified] = open_factors,
        *,
        workers: int = 2,
    ) -> None:
        if budget_bytes < 0:
            raise ConfigurationError(f"a budget of {budget_bytes} bytes for adapters; expected 0 or more")
        self._budget = budget_bytes
        self._load = load
        self._loaders = ThreadPoolExecutor(workers, "lora-hub-load")
        self._lock = threading.Lock()
        self._closed = False
        self._entries: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, _Entry] = OrderedDict()
        self._held = self._bytes = self._pinned = 0
        self._hits = self._misses = self._loads = self._evictions = 0
        self._load_s = 0.0

    # -- asking ------------------------------------------------------------------------------------------------

    def prefetch(self, adapters: Sequence[Adapter], on_done: Callable[[Held | BaseException], None]) -> None:
        """Have all these in memory at once. Never blocks.

        Args:
            on_done: called once with the factors, or with the first error: by this thread if nothing has to be
                loaded, else by another. It must be quick and may call the store. EngineClosedError after ``close``.
        """
        order = _Order([], on_done, perf_counter())
        with self._lock:
            closed = self._closed
            if not closed:
                for adapter in adapters:
                    self._ask(order, adapter)
        if closed:
            _tell(order, _closed_error())
        elif not order.missing:
            _tell(order, Held(self, order, 0.0))

    def get(self, adapters: Sequence[Adapter]) -> Held:
        """As ``prefetch``, but waits.

        Raises:
            AdapterChangedError: an adapter's files are gone or damaged.
            EngineClosedError: the store was closed.
        """
        answer: Future[Held | BaseException] = Future()
        self.prefetch(adapters, answer.set_result)
        found = answer.result()
        if isinstance(found, BaseException):
            raise found
        return found

    def discard(self, digest: str) -> bool:
        """Forget a content now; whether it was known. Its memory is freed as soon as nobody uses it."""
        with self._lock:
            entry = self._entries.pop(digest, None)
            if entry is None:
                return False
            if self._idle.pop(digest, None):
                self._free(entry)
            return True

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                self._held,
                self._bytes,
                self._pinned,
                self._budget,
                self._hits,
                self._misses,
                self._loads,
                self._evictions,
                self._load_s,
            )

    def close(self) -> None:
        """Forget everything and let nobody wait: pending calls end with EngineClosedError.

        What is in use stays until it is released. Files that are just being read are read to their end, by threads
        that nobody waits for. May be called twice.
        """
        with self._lock:
            self._closed = True
            waiting = {id(order): order for entry in self._entries.values() for order in entry.waiting}
            for entry in self._entries.values():
                entry.waiting = []
            for entry in self._idle.values():
                self._free(entry)
            self._idle.clear()
            self._entries.clear()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        for order in waiting.values():
            self._give_up(order, _closed_error())

    # -- loading -----------------------------------------------------------------------------------------------

    def _ask(self, order: _Order, adapter: Adapter) -> None:
        entry = self._entries.get(adapter.digest)
        if entry is None:
            entry = _Entry(adapter.digest, [adapter])
            self._loaders.submit(self._run, entry)
            self._entries[adapter.digest] = entry
        found = entry.factors is not None
        order.entries.append(entry)
        order.origins.append("host" if found else "disk")
        self._hits += found
        self._misses += not found
        self._pin(entry)
        if not found and order not in entry.waiting:
            entry.waiting.append(order)
            order.missing += 1
            if all(source.folder != adapter.folder for source in entry.sources):
                entry.sources.append(adapter)

    def _run(self, entry: _Entry) -> None:
        tried = 0
        while True:
            began = perf_counter()
            try:
                loaded = self._load(entry.sources[tried])
                factors = loaded.factors if isinstance(loaded, Unverified) else loaded
                size = factors.size_bytes
            except BaseException as error:
                tried += 1
                if self._failed(entry, error, tried):
                    return
            else:
                break
        with self._lock:
            self._loads += 1
            self._load_s += perf_counter() - began
            entry.factors, entry.size = factors, size
            entry.unverified = loaded if isinstance(loaded, Unverified) else None
            self._held += 1
            self._bytes += size
            self._pinned += size
            self._shrink()
            done = []
            for order in entry.waiting:
                order.missing -= 1
                if not order.missing:
                    done.append(order)
            entry.waiting = []
            if entry.unverified is not None and not self._closed:
                # Behind the loads that others wait for already.
                self._loaders.submit(self._verify, entry)
            self._unpin(entry)
        for order in done:
            _tell(order, Held(self, order, perf_counter() - order.began))

    def _failed(self, entry: _Entry, error: BaseException, tried: int) -> bool:
        """Whether that was the last folder; then all who wait for the entry are told."""
        with self._lock:
            if tried < len(entry.sources):
                return False
            if self._entries.get(entry.digest) is entry:
                del self._entries[entry.digest]
            orders, entry.waiting = entry.waiting, []
            for order in orders:
                # They may wait for others too, and are to be told once.
                for other in order.entries:
                    if order in other.waiting:
                        other.waiting.remove(order)
        for order in orders:
            self._give_up(order, error)
        return True

    def _give_up(self, order: _Order, error: BaseException) -> None:
        with self._lock:
            for entry in order.entries:
                self._unpin(entry)
        _tell(order, error)

    def _verify(self, entry: _Entry) -> None:
        """Set the entry's ``error``, if it has one. Whoever comes first does the work, others wait for it."""
        with entry.checking:
            with self._lock:
                unverified = entry.unverified
                if unverified is None:
                    return
                self._pin(entry)
            error: BaseException | None = None
            try:
                unverified.verify()
            except BaseException as found:
                # The frames of its traceback would keep the memory from being freed.
                error = found.with_traceback(None)
            with self._lock:
                entry.error = error
                entry.unverified = None
                if error is not None and self._entries.get(entry.digest) is entry:
                    del self._entries[entry.digest]
                self._unpin(entry)

    # -- accounting, under the lock ----------------------------------------------------------------------------

    def _pin(self, entry: _Entry) -> None:
        if not entry.pins:
            del self._idle[entry.digest]
            self._pinned += entry.size
        entry.pins += 1

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        if entry.pins or entry.factors is None:
            return
        self._pinned -= entry.size
        if self._entries.get(entry.digest) is entry:
            self._idle[entry.digest] = entry
            self._shrink()
        else:
            self._free(entry)

    def _shrink(self) -> None:
        while self._bytes > self._budget and self._idle:
            digest, entry = self._idle.popitem(last=False)
            del self._entries[digest]
            self._free(entry)
            self._evictions += 1

    def _free(self, entry: _Entry) -> None:
        entry.factors = entry.unverified = None
        self._held -= 1
        self._bytes -= entry.size


def _tell(order: _Order, answer: Held | BaseException) -> None:
    try:
        order.on_done(answer)
    except Exception:  # a loader thread serves others too
        _LOG.exception("a callback of AdapterStore.prefetch failed")


def _closed_error() -> EngineClosedError:
    return EngineClosedError("the store of adapters was closed; open the hub again for a new one")
