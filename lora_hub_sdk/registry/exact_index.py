"""A vector index in memory: exact, filled from SQL by every process for itself."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_hub_sdk.registry.index import Entry, IndexFilter, Vector, best

_T = TypeVar("_T", bound=np.generic)

#: Scores computed at a time; bounds the memory of a batch of queries to 64 MB.
_SCORES_PER_BLOCK: Final = 1 << 24
_FIRST_CAPACITY: Final = 64
#: Copying the allowed rows together is cheaper than scoring all rows, while they are fewer than this share.
_GATHER_BELOW: Final = 0.25


class ExactIndex:
    """A ``VectorIndex`` that scores every allowed vector: never approximate, never stale, empty at birth.

    Vectors lie apart by namespace and base model, so that a filter makes a search cheaper.
    """

    is_shared = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._partitions: dict[tuple[str, str], _Partition] = {}
        self._home: dict[str, _Partition] = {}
        self._stamp: int | None = None

    def put(self, entries: Sequence[Entry]) -> None:
        """Insert, or replace what has the key already."""
        with self._lock:
            fresh: dict[tuple[str, str], dict[str, Entry]] = {}
            for entry in entries:
                if entry.key in self._home:
                    self._home.pop(entry.key).remove(entry.key)
                fresh.setdefault((entry.namespace, entry.base_model), {})[entry.key] = entry
            for place, by_key in fresh.items():
                partition = self._partitions.setdefault(place, _Partition())
                partition.append(by_key)
                self._home.update(dict.fromkeys(by_key, partition))

    def delete(self, keys: Collection[str]) -> None:
        """Remove; keys that are not there are ignored."""
        with self._lock:
            for key in keys:
                partition = self._home.pop(key, None)
                if partition is not None:
                    partition.remove(key)
            self._partitions = {place: held for place, held in self._partitions.items() if held.rows}

    def count(self) -> int:
        """How many vectors there are."""
        return len(self._home)

    def keys(self) -> set[str]:
        """All keys."""
        with self._lock:
            return set(self._home)

    def read(self, keys: Sequence[str]) -> dict[str, Vector]:
        """Copies of the vectors; keys that are not there are left out."""
        with self._lock:
            return {key: self._home[key].vector(key) for key in keys if key in self._home}

    def search(self, vectors: Sequence[Vector], count: int, allowed: IndexFilter) -> list[list[tuple[str, float]]]:
        """For each vector up to ``count`` (key, cosine) pairs, nearest first."""
        if not len(vectors) or count < 1:
            return [[] for _ in vectors]
        with self._lock:
            chosen = [
                partition.view()
                for (namespace, base_model), partition in self._partitions.items()
                if namespace == allowed.namespace and allowed.base_model in (None, base_model)
            ]
        queries = np.stack(list(vectors))
        # Outside the lock: a view's rows never change, so searches neither wait for writes nor for each other.
        found = [view.search(queries, count, allowed) for view in chosen]
        return [best([pair for rows in found for pair in rows[row]], count) for row in range(len(queries))]

    def stamp(self) -> int | None:
        """The version of SQL that this index was last said to contain in full."""
        return self._stamp

    def set_stamp(self, version: int) -> None:
        """Say that everything up to this version of SQL is in the index."""
        self._stamp = version

    def clear(self) -> None:
        """Remove everything, the stamp included."""
        with self._lock:
            self._partitions, self._home, self._stamp = {}, {}, None

    def close(self) -> None:
        """Release the memory."""
        self.clear()


class _Partition:
    """Rows that are only ever appended; removed ones are marked, and dropped once they are the half."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self._keys: list[str] = []
        self._ids = np.empty(0, np.int64)
        self._alive = np.empty(0, np.bool_)
        self._matrix = np.empty((0, 0), np.float32)

    def append(self, entries: dict[str, Entry]) -> None:
        start, end = len(self._keys), len(self._keys) + len(entries)
        vectors = np.stack([entry.vector for entry in entries.values()])
        if end > len(self._matrix):
            capacity = max(end, 2 * start, _FIRST_CAPACITY)
            self._ids = _grown(self._ids[:start], capacity)
            self._alive = _grown(self._alive[:start], capacity)
            self._matrix = _grown(self._matrix[:start].reshape(start, vectors.shape[1]), capacity)
        self._ids[start:end] = [entry.adapter_id for entry in entries.values()]
        self._alive[start:end] = True
        self._matrix[start:end] = vectors
        self.rows.update(zip(entries, range(start, end), strict=True))
        self._keys.extend(entries)

    def remove(self, key: str) -> None:
        self._alive[self.rows.pop(key)] = False
        if 2 * len(self.rows) < len(self._keys) and len(self._keys) > _FIRST_CAPACITY:
            self._compact()

    def vector(self, key: str) -> Vector:
        row: Vector = self._matrix[self.rows[key]].copy()
        return row

    def view(self) -> _View:
        size = len(self._keys)
        alive = None if len(self.rows) == size else self._alive[:size].copy()
        return _View(self._keys, self._ids[:size], self._matrix[:size], alive)

    def _compact(self) -> None:
        # A new list and new arrays, because searches may still read the old ones.
        kept = np.flatnonzero(self._alive[: len(self._keys)])
        self._keys = [self._keys[row] for row in kept]
        self._ids, self._alive, self._matrix = self._ids[kept], self._alive[kept], self._matrix[kept]
        self.rows = {key: row for row, key in enumerate(self._keys)}


@dataclass(frozen=True, slots=True)
class _View:
    """The rows of a partition at one moment. ``alive`` is None where none was removed."""

    keys: list[str]
    ids: NDArray[np.int64]
    matrix: NDArray[np.float32]
    alive: NDArray[np.bool_] | None

    def search(self, queries: NDArray[np.float32], count: int, allowed: IndexFilter) -> list[list[tuple[str, float]]]:
        mask, matrix, rows = self._mask(allowed), self.matrix, None
        if mask is not None and np.count_nonzero(mask) < _GATHER_BELOW * len(mask):
            rows = np.flatnonzero(mask)
            matrix, mask = matrix[rows], None
        if not len(matrix):
            return [[] for _ in queries]
        found: list[list[tuple[str, float]]] = []
        block = max(1, _SCORES_PER_BLOCK // len(matrix))
        for start in range(0, len(queries), block):
            scores = queries[start : start + block] @ matrix.T
            if mask is not None:
                scores[:, ~mask] = -np.inf
            found.extend(self._nearest(row, rows, count) for row in scores)
        return found

    def _mask(self, allowed: IndexFilter) -> NDArray[np.bool_] | None:
        """The rows that may be returned; None where all may."""
        masks = [] if self.alive is None else [self.alive]
        if allowed.only is not None:
            masks.append(np.isin(self.ids, _array(allowed.only)))
        if allowed.exclude:
            masks.append(np.isin(self.ids, _array(allowed.exclude), invert=True))
        return np.logical_and.reduce(masks) if masks else None

    def _nearest(
        self, scores: NDArray[np.float32], rows: NDArray[np.intp] | None, count: int
    ) -> list[tuple[str, float]]:
        top = np.argpartition(scores, -count)[-count:] if count < len(scores) else np.arange(len(scores))
        top = top[np.argsort(-scores[top], kind="stable")]
        top = top[scores[top] > -np.inf]
        names = top if rows is None else rows[top]
        return [(self.keys[name], float(score)) for name, score in zip(names, scores[top], strict=True)]


def _array(ids: Collection[int]) -> NDArray[np.int64]:
    return np.fromiter(ids, np.int64, len(ids))


def _grown(array: NDArray[_T], capacity: int) -> NDArray[_T]:
    grown = np.empty((capacity, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
