"""The vector index: a contract. What implements it is a cache of SQL and may be thrown away at any time."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

#: (dimension,) float32 of length 1.
Vector = NDArray[np.float32]
_VECTOR_TOLERANCE: Final = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One vector of one adapter, with what every search filters by.

    ``key`` is never given to another vector: a changed vector comes under a new key. Late writes of a slow process
    therefore leave nothing worse behind than keys that SQL no longer knows, and comparing keys proves agreement.
    """

    adapter_id: int
    embedding_id: int
    namespace: str
    base_model: str
    vector: Vector

    @property
    def key(self) -> str:
        return key_of(self.adapter_id, self.embedding_id)


def key_of(adapter_id: int, embedding_id: int) -> str:
    """The key of a vector."""
    return f"{adapter_id}-{embedding_id}"


def embedding_id_of(key: str) -> int:
    """The embedding's id within a key."""
    return int(key.partition("-")[2])


def is_same(one: Vector, other: Vector) -> bool:
    """Whether two vectors are one, but for the last digits that bringing it to length 1 again may change."""
    return bool(np.allclose(one, other, atol=_VECTOR_TOLERANCE))


def adapter_id_of(key: str) -> int:
    """The adapter's id within a key."""
    return int(key.partition("-")[0])


@dataclass(frozen=True, slots=True)
class IndexFilter:
    """Which vectors a search may return. ``only`` and ``exclude`` are adapter ids."""

    namespace: str
    base_model: str | None = None
    only: frozenset[int] | None = None
    exclude: frozenset[int] = frozenset()


class VectorIndex(Protocol):
    """The vectors of one registry under one encoder. Thread-safe.

    Every method may raise ``IndexUnavailableError`` (a server that does not answer: try again later) or
    ``IndexDamagedError`` (files that cannot be read any more: ``clear`` it or throw it away, and fill it from SQL), and
    raises nothing else for reasons of storage. ``is_shared`` tells whether other processes may be searching it too.
    """

    is_shared: bool

    def put(self, entries: Sequence[Entry]) -> None:
        """Insert, or replace what has the key already."""

    def delete(self, keys: Collection[str]) -> None:
        """Remove; keys that are not there are ignored."""

    def count(self) -> int:
        """How many vectors there are; quick."""

    def keys(self) -> set[str]:
        """All keys."""

    def read(self, keys: Sequence[str]) -> dict[str, Vector]:
        """The vectors as they are stored; keys that are not there are left out."""

    def search(self, vectors: Sequence[Vector], count: int, allowed: IndexFilter) -> list[list[tuple[str, float]]]:
        """For each vector up to ``count`` (key, cosine) pairs, nearest first."""

    def stamp(self) -> int | None:
        """The version of SQL that this index was last said to contain in full; None where nobody said so."""

    def set_stamp(self, version: int) -> None:
        """Say that everything up to this version of SQL is in the index."""

    def clear(self) -> None:
        """Remove everything, the stamp included."""

    def close(self) -> None:
        """Release what the index holds open; the content stays where it outlives a process."""


def best(pairs: Iterable[tuple[str, float]], count: int) -> list[tuple[str, float]]:
    """The ``count`` pairs of the highest cosine, nearest first; merges what several parts of an index found."""
    return heapq.nlargest(count, pairs, key=lambda pair: pair[1])
