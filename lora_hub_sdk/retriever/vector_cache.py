"""Vectors of texts that were encoded before, as many as fit into a bound of bytes."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What an entry takes beside its numbers: key, array and links. Found by measuring, and rounded up.
_ENTRY_BYTES: Final = 400


@dataclass(frozen=True, slots=True)
class CacheUse:
    """``hits`` and ``misses`` count texts asked for, since the start; ``texts`` are held, and take ``bytes``."""

    hits: int
    misses: int
    texts: int
    bytes: int

    @property
    def hit_rate(self) -> float:
        """In [0, 1]; 0 where nothing was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class VectorCache:
    """Keeps vectors by the digest of their text, never the text; drops those unused for longest. Thread-safe.

    Args:
        max_bytes: how much memory it may take; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The vectors that are held, by key. They are the cache's own: copy before changing."""
        with self._lock:
            found = {key: self._held[key] for key in keys if key in self._held}
            for key in found:
                self._held.move_to_end(key)
            hits = sum(key in found for key in keys)
            self._hits += hits
            self._misses += len(keys) - hits
        return found

    def keep(self, key: bytes, vector: NDArray[np.float32]) -> None:
        """Hold a copy of a vector."""
        size = vector.nbytes + _ENTRY_BYTES
        if size > self._max_bytes:
            return
        # A row of a batch would keep the whole batch alive.
        own = vector.copy()
        with self._lock:
            if key not in self._held:
                self._bytes += size
            self._held[key] = own
            self._held.move_to_end(key)
            while self._bytes > self._max_bytes:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.nbytes + _ENTRY_BYTES

    @property
    def use(self) -> CacheUse:
        """How it did so far."""
        with self._lock:
            return CacheUse(self._hits, self._misses, len(self._held), self._bytes)


def text_key(text: str) -> bytes:
    """Names a text: 16 bytes of BLAKE2, lone surrogates allowed."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
