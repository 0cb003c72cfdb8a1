"""Who runs when: which waiting requests join the running rows, fair to every client and within what memory allows."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.errors import ConfigurationError

#: So many others may overtake an entry that finds no room; so many of those are looked past in one go.
_PATIENCE: Final = 64
#: Removed entries that a heap may hold beyond as many as live ones.
_SLACK: Final = 64


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What may run and wait at once.

    Args:
        max_rows: rows that decode together.
        max_tokens: places of the key-value cache, which is one rectangle: rows x the width of the widest.
        max_waiting: entries that wait; more are refused.
        prefill_tokens: prompt tokens that join in one go; a single longer prompt joins by itself.
        gather_s: seconds that an idle engine waits after the first arrival for company.
        max_ranks: the running rows' ranks together; a single row above it runs alone.

    Raises:
        ConfigurationError: a limit that lets nothing run.
    """

    max_rows: int = 64
    max_tokens: int = 65536
    max_waiting: int = 4096
    prefill_tokens: int = 2048
    gather_s: float = 0.002
    max_ranks: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_tokens", "max_waiting", "prefill_tokens", "max_ranks"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not 0 <= self.gather_s < float("inf"):
            raise ConfigurationError(f"gather_s={self.gather_s}: expected seconds, 0 or more")


@dataclass(frozen=True, slots=True)
class Entry:
    """One request as the scheduler sees it.

    ``width`` is its row's share of the cache: ``prompt_tokens`` and the tokens that it may answer with. ``ranks`` is
    the sum of its adapters' ranks. ``arrived`` and ``deadline`` are seconds of the same clock as every ``now``.
    """

    id: int
    client: str
    width: int
    prompt_tokens: int
    ranks: int
    arrived: float
    deadline: float | None = None


class Scheduler:
    """Continuous batching as a plain data structure: no threads, no clock, every call cheap.

    Clients take turns; within a client the first that came goes first. An entry that is not ready is passed over and
    keeps its place. An entry that is ready and finds no room holds back only its own client, until 64 others have
    joined since; then nothing joins before it does.

    Not thread-safe: whoever owns it serialises its calls.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits: Final = limits
        self._items: dict[int, _Item] = {}
        self._running: dict[int, _Item] = {}
        self._turns: OrderedDict[str, _Pile] = OrderedDict()  # clients with ready entries, the next to be served first
        self._arrivals = _Pile()  # the same entries by when they arrived
        self._again = _Pile()  # entries of failed passes, by when they first joined
        self._deadlines = _Pile()
        self._offered = 0
        self._joined = 0
        self._changed = False  # whether anything happened that could let somebody join

    @property
    def waiting(self) -> int:
        """Entries that wait, ready or not."""
        return len(self._items) - len(self._running)

    @property
    def running(self) -> int:
        """Entries that have joined and not ended."""
        return len(self._running)

    def offer(self, entry: Entry, *, ready: bool) -> bool:
        """Put an entry in the queue; False, and nothing is taken, where ``max_waiting`` are there already.

        Args:
            ready: whether its adapters are in memory; else ``ready`` has to be called for it later.

        Raises:
            ConfigurationError: an id that is in use.
        """
        if entry.id in self._items:
            raise ConfigurationError(f"entry {entry.id} was offered twice; give each request an id of its own")
        if self.waiting >= self.limits.max_waiting:
            return False
        self._offered += 1
        self._items[entry.id] = _Item(entry, self._offered, cap=self.limits.max_rows)
        if entry.deadline is not None:
            self._deadlines.push(entry.deadline, entry.id)
        if ready:
            self.ready(entry.id)
        return True

    def ready(self, id: int) -> None:  # noqa: A002
        """An entry's adapters are in memory. Unknown ids are ignored: it may be gone already."""
        item = self._items.get(id)
        if item is None or item.ready:
            return
        item.ready = self._changed = True
        self._turns.setdefault(item.entry.client, _Pile()).push(item.place, id)
        self._arrivals.push(item.entry.arrived, id)

    def withdraw(self, id: int) -> bool:  # noqa: A002
        """Take an entry out, waiting or running; False where it is not here."""
        item = self._items.pop(id, None)
        if item is None:
            return False
        self._running.pop(id, None)
        self._again.remove(id)
        self._deadlines.remove(id)
        self._leave_queue(item)
        self._changed = True
        return True

    def finished(self, id: int) -> None:  # noqa: A002
        """A running row has ended. Unknown ids are ignored."""
        self.withdraw(id)

    def expired(self, now: float) -> tuple[int, ...]:
        """Take out whatever has reached its deadline, waiting or running; the earliest deadline first."""
        late = []
        while (first := self._deadlines.first()) is not None and first[0] <= now:
            late.append(first[1])
            self.withdraw(first[1])
        return tuple(late)

    def admit(self, now: float) -> tuple[int, ...]:
        """Which waiting entries join the running rows now, in their order; they count as running from here on."""
        if not self._changed or self._gathers_until(now) is not None:
            return ()
        self._changed = False
        batch = _Batch(self.limits, self._running.values())
        passed: list[tuple[str, _Pile]] = []
        joined: list[int] = []
        prompt_tokens = 0
        while (item := self._next(batch, passed)) is not None:
            prompt_tokens += item.entry.prompt_tokens
            if joined and prompt_tokens > self.limits.prefill_tokens:
                self._changed = True  # there is room for it, in the next go
                break
            self._join(item)
            batch.add(item)
            joined.append(item.entry.id)
        for client, pile in reversed(passed):
            self._turns[client] = pile
            self._turns.move_to_end(client, last=False)
        return tuple(joined)

    def wake_at(self, now: float) -> float | None:
        """When to call ``expired`` and ``admit`` again if nothing else happens; ``now`` is at once, None is never."""
        times = []
        if (first := self._deadlines.first()) is not None:
            times.append(first[0])
        if self._changed and (self._arrivals or self._again):
            until = self._gathers_until(now)
            times.append(now if until is None else until)
        return max(now, min(times)) if times else None

    def failed(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A forward pass over these running rows failed: all wait again, before everybody else and in smaller batches.

        From now on each of them runs only where at most half as many rows run, so that a bad row is found by
        bisection: among n running rows after at most floor(log2(n)) + 1 failed passes.

        Args:
            ids: every row of the pass, also those that were withdrawn since.

        Returns:
            The row that failed with no other row running, if that is what happened: it is taken out, the caller
            fails it.
        """
        if len(ids) == 1 and self._running.keys() == set(ids):
            self.withdraw(ids[0])
            return (ids[0],)
        for entry_id in ids:
            item = self._running.pop(entry_id, None)
            if item is not None:
                item.cap = max(1, len(ids) // 2)
                self._again.push(item.joined, entry_id)
                self._changed = True
        return ()

    def _gathers_until(self, now: float) -> float | None:
        """When an idle engine stops waiting for company; None: it does not wait."""
        first = self._arrivals.first()
        if first is None or self._running or self._again or len(self._arrivals) >= self.limits.max_rows:
            return None
        until = first[0] + self.limits.gather_s
        return until if until > now else None

    def _next(self, batch: _Batch, passed: list[tuple[str, _Pile]]) -> _Item | None:
        """Who joins next; None: nobody can. Clients without room go from the turns to ``passed``."""
        if (again := self._again.first()) is not None:
            item = self._items[again[1]]
            return item if batch.fits(item) else None
        while self._turns and not batch.full and len(passed) < _PATIENCE:
            client, pile = next(iter(self._turns.items()))
            head = pile.first()
            assert head is not None, "a client without ready entries has no turn"
            item = self._items[head[1]]
            if batch.fits(item):
                return item
            if item.passed_at is None:
                item.passed_at = self._joined
            if self._joined - item.passed_at >= _PATIENCE:
                return None
            passed.append((client, self._turns.pop(client)))
        return None

    def _join(self, item: _Item) -> None:
        if item.joined:
            self._again.remove(item.entry.id)
        else:
            self._joined += 1
            item.joined = self._joined
            self._leave_queue(item)
            if item.entry.client in self._turns:
                self._turns.move_to_end(item.entry.client)
        self._running[item.entry.id] = item

    def _leave_queue(self, item: _Item) -> None:
        self._arrivals.remove(item.entry.id)
        pile = self._turns.get(item.entry.client)
        if pile is not None:
            pile.remove(item.entry.id)
            if not pile:
                del self._turns[item.entry.client]


@dataclass(slots=True)
class _Item:
    """An entry and what has become of it. ``joined`` is the how-manieth it was to join, 0 before that."""

    entry: Entry
    place: int
    cap: int
    ready: bool = False
    joined: int = 0
    passed_at: int | None = None


class _Batch:
    """The running rows as one shape, and whether another row fits beside them."""

    def __init__(self, limits: EngineLimits, rows: Iterable[_Item]) -> None:
        self._limits = limits
        self._rows = self._width = self._ranks = 0
        self._cap = limits.max_rows
        for row in rows:
            self.add(row)

    def add(self, row: _Item) -> None:
        self._rows += 1
        self._width = max(self._width, row.entry.width)
        self._ranks += row.entry.ranks
        self._cap = min(self._cap, row.cap)

    @property
    def full(self) -> bool:
        """Whether not even the smallest row would fit."""
        return self._rows >= self._cap or (self._rows > 0 and not self._holds(0, 0))

    def fits(self, row: _Item) -> bool:
        """A row above the limits fits where nothing else runs."""
        if self._rows == 0:
            return True
        return self._rows < min(self._cap, row.cap) and self._holds(row.entry.width, row.entry.ranks)

    def _holds(self, width: int, ranks: int) -> bool:
        places = (self._rows + 1) * max(self._width, width)
        return places <= self._limits.max_tokens and self._ranks + ranks <= self._limits.max_ranks


class _Pile:
    """Entries in the order of a key. Removed ones stay in the heap until they come up or outnumber the others."""

    def __init__(self) -> None:
        self._keys: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def push(self, key: float, entry_id: int) -> None:
        self._keys[entry_id] = key
        heapq.heappush(self._heap, (key, entry_id))

    def remove(self, entry_id: int) -> None:
        """Nothing happens where it is not here."""
        if self._keys.pop(entry_id, None) is not None and len(self._heap) > 2 * len(self._keys) + _SLACK:
            self._heap = [(key, kept) for kept, key in self._keys.items()]
            heapq.heapify(self._heap)

    def first(self) -> tuple[float, int] | None:
        """The smallest key and its entry."""
        while self._heap:
            key, entry_id = self._heap[0]
            if self._keys.get(entry_id) == key:
                return key, entry_id
            heapq.heappop(self._heap)
        return None
