"""A vector index that follows SQL: it is brought up to date before every use, and rebuilt where it is damaged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, TypeVar

from lora_hub_sdk.errors import EncoderMismatchError, IndexDamagedError
from lora_hub_sdk.registry.index import IndexFilter, Vector, VectorIndex, adapter_id_of, is_same
from lora_hub_sdk.registry.queries import SqlQueries
from lora_hub_sdk.registry.selection import is_narrow
from lora_hub_sdk.types import Adapter, AdapterFilter, Hit

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Called with how many vectors are done, and how many there are in all.
Progress = Callable[[int, int], None]

#: Fetched beyond k, so that equal scores at the edge are ordered by name and not by the index's chance.
_TIE_MARGIN: Final = 16
_SCORE_DIGITS: Final = 6
#: How often a search starts anew because somebody changed, while it ran, what it had found.
_TRIES: Final = 5
#: Filters whose adapters are remembered until something changes.
_REMEMBERED: Final = 64


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the vector index holds exactly the vectors of SQL. Keys are ``<adapter id>-<embedding id>``.

    ``changed`` are keys whose vector is another one than SQL's. ``unembedded`` names adapters that no search can find,
    as they have no vector under the current encoder.
    """

    vectors: int
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    changed: tuple[str, ...]
    unembedded: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return not self.missing and not self.surplus and not self.changed


class Follower:
    """Searches SQL's vectors by means of an index. Thread-safe.

    Writers only write SQL. Whoever searches compares SQL's version, which every commit raises, with the one that the
    index was last brought to, and applies what changed in between: so nothing that was committed is missed, whichever
    process committed it, and a crash between the two leaves nothing to repair.

    Args:
        open_index: opens the index; called when it is first needed.
        encoder: fingerprint of the encoder whose vectors are searched.
    """

    def __init__(self, store: SqlQueries, open_index: Callable[[], VectorIndex], encoder: str) -> None:
        self._store = store
        self._open = open_index
        self._encoder = encoder
        self._lock = threading.RLock()
        # The version of SQL that the index was brought to, and the keys that it then had, by adapter.
        self._seen: int | None = None
        self._held: dict[int, set[str]] = {}
        self._visible: dict[AdapterFilter, frozenset[int]] = {}

    @cached_property
    def _index(self) -> VectorIndex:
        return self._open()

    def search(self, vectors: Sequence[Vector], k: int, allowed: AdapterFilter) -> list[list[Hit]]:
        """For each vector the up to k nearest adapters that the filter lets through, best first, then by name.

        Raises:
            EncoderMismatchError: adapters wait to be embedded by the current encoder.
            IndexUnavailableError: the index's server does not answer.
        """
        for attempt in range(1, _TRIES + 1):
            with self._lock:
                found = self._mended(lambda: self._nearest(vectors, k + _TIE_MARGIN, allowed))
                seen = self._seen
            # Reading adapters is most of a search's time. Only the last try needs others to put in a stray's place.
            rows = found if attempt == _TRIES else [_leading(row, k) for row in found]
            keys = {key for row in rows for key, _ in row}
            adapters = self._store.behind(keys, allowed)
            strays = keys - adapters.keys()
            if not strays:
                break
            with self._lock:
                # Where nobody changed these adapters just now, the index has keys that it should not have there.
                if self._seen == seen == self._store.version():
                    self._index.delete(strays)
                    self._forget()
        return [_ranked(row, adapters)[:k] for row in rows]

    def verify(self) -> Verification:
        """Compare every vector of the index with SQL's, mending nothing; what was not yet applied is applied before."""
        with self._lock:
            version = self._store.version()
            wanted, held, changed = self._mended(lambda: self._compared(version))
        return Verification(
            len(wanted),
            tuple(sorted(wanted - held)),
            tuple(sorted(held - wanted)),
            tuple(sorted(changed)),
            tuple(adapter.name for adapter in self._store.without_embedding(self._encoder)),
        )

    def reindex(self, progress: Progress | None = None) -> int:
        """Write every vector anew from SQL and remove all others; returns the number of vectors.

        Other processes that search the same index meanwhile miss nothing.
        """
        with self._lock:
            self._forget()
            self._mended(lambda: self._rewrite(progress))
            return self._index.count()

    def close(self) -> None:
        """Release the index."""
        with self._lock:
            if "_index" in self.__dict__:
                self._index.close()

    def _mended(self, act: Callable[[], _T]) -> _T:
        """What ``act`` gives. Where the index is damaged, everything is compared anew, and if that does not help, the
        index is thrown away and built from SQL."""
        try:
            return act()
        except IndexDamagedError as error:
            _log.warning("the vector index is damaged and follows SQL from the beginning: %s", error)
            self._forget()
        try:
            return act()
        except IndexDamagedError:
            self._forget()
            self._index.clear()
        return act()

    def _rewrite(self, progress: Progress | None) -> None:
        if not self._index.is_shared:
            # Quicker than replacing, and it reads nothing of files that may be damaged.
            self._index.clear()
            self._follow(progress)
            return
        self._put(self._store.keys(self._encoder), progress)
        self._follow()

    def _forget(self) -> None:
        self._seen = None
        self._held = {}

    def _nearest(self, vectors: Sequence[Vector], count: int, allowed: AdapterFilter) -> list[list[tuple[str, float]]]:
        self._follow()
        return self._index.search(vectors, count, self._index_filter(allowed))

    def _follow(self, progress: Progress | None = None) -> None:
        """Bring the index to what SQL says, if anything was written since, by whomever."""
        version = self._store.version()
        if version == self._seen:
            return
        changed = None if self._seen is None else self._store.changed_since(self._seen)
        self._check_embedded(changed)
        # Until this is done, nothing is known of the index: an error half way leads to a comparison of all keys.
        self._seen = None
        self._index.stamp()  # by which an index notices that somebody empties it before it is stamped again
        held = self._index.keys() if changed is None else self._taken(changed)
        wanted = self._store.keys(self._encoder, changed)
        if held - wanted:
            self._index.delete(held - wanted)
        self._put(wanted - held, progress)
        if changed is None:
            self._held = {}
        for key in wanted:
            self._held.setdefault(adapter_id_of(key), set()).add(key)
        if changed is None or held != wanted:
            self._index.set_stamp(version)
        self._visible.clear()
        self._seen = version

    def _taken(self, adapters: Iterable[int]) -> set[str]:
        return {key for adapter in adapters for key in self._held.pop(adapter, ())}

    def _put(self, keys: Collection[str], progress: Progress | None) -> None:
        done = 0
        for entries in self._store.entries(sorted(keys)):
            self._index.put(entries)
            done += len(entries)
            if progress is not None:
                progress(done, len(keys))

    def _check_embedded(self, changed: Collection[int] | None) -> None:
        waiting = [
            adapter.name
            for adapter in self._store.without_embedding(self._encoder, changed)
            if adapter.sample_count or adapter.origin == "guess"
        ]
        if waiting:
            raise EncoderMismatchError(
                f"{len(waiting)} adapters have no vector under the current encoder ({', '.join(waiting[:3])}...); run "
                "hub.reindex() or `lora-hub reindex`, or open the hub with the encoder they were registered with"
            )

    def _compared(self, version: int) -> tuple[set[str], set[str], set[str]]:
        """The keys of SQL, those of the index, and those of both whose vectors differ."""
        stamp = self._index.stamp() if self._seen is None else None
        if stamp is not None and stamp <= version:
            # Another process left this index in agreement with an earlier version; only what came later is applied.
            self._held = _by_adapter(self._index.keys())
            self._seen = stamp
        self._follow()
        wanted, held = self._store.keys(self._encoder), self._index.keys()
        changed: set[str] = set()
        for entries in self._store.entries(sorted(wanted & held)):
            stored = self._index.read([entry.key for entry in entries])
            changed |= {entry.key for entry in entries if not is_same(stored[entry.key], entry.vector)}
        return wanted, held, changed

    def _index_filter(self, allowed: AdapterFilter) -> IndexFilter:
        exclude = self._store.ids_of(allowed.exclude, allowed.namespace) if allowed.exclude else frozenset()
        if not is_narrow(allowed):
            return IndexFilter(allowed.namespace, allowed.base_model, exclude=exclude)
        question = replace(allowed, exclude=())
        if question not in self._visible:
            if len(self._visible) >= _REMEMBERED:
                self._visible.clear()
            self._visible[question] = self._store.visible_ids(question)
        return IndexFilter(allowed.namespace, allowed.base_model, self._visible[question] - exclude)


def _by_adapter(keys: Iterable[str]) -> dict[int, set[str]]:
    grouped: dict[int, set[str]] = {}
    for key in keys:
        grouped.setdefault(adapter_id_of(key), set()).add(key)
    return grouped


def _leading(row: Sequence[tuple[str, float]], k: int) -> Sequence[tuple[str, float]]:
    """The first k of a row, and what ranks equal to the last of them."""
    end = min(k, len(row))
    while 0 < end < len(row) and _rounded(_cosine(row[end][1])) == _rounded(_cosine(row[k - 1][1])):
        end += 1
    return row[:end]


def _ranked(row: Sequence[tuple[str, float]], adapters: dict[str, Adapter]) -> list[Hit]:
    hits = [Hit(adapters[key], _cosine(score)) for key, score in row if key in adapters]
    return sorted(hits, key=lambda hit: (-_rounded(hit.score), hit.adapter.name))


def _cosine(score: float) -> float:
    return max(-1.0, min(1.0, score))


def _rounded(score: float) -> float:
    return round(score, _SCORE_DIGITS)
