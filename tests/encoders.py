"""An encoder that nobody can load."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_DIMENSION: Final = 48


class Hashing:
    """An ``Encoder`` that hashes a text, after its own name, to a random direction.

    ``texts`` are those that it was given; ``before`` is called with each call's.
    """

    def __init__(self, name: str, before: Callable[[Sequence[str]], object] | None = None) -> None:
        self.name = name
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        self.dimension = _DIMENSION
        self.texts: list[str] = []
        self._before = before

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._before is not None:
            self._before(texts)
        self.texts += texts
        seeds = [hashlib.sha256(f"{self.name}: {text}".encode()).digest()[:8] for text in texts]
        rows = [np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(_DIMENSION) for seed in seeds]
        vectors = np.array(rows).reshape(len(texts), _DIMENSION)
        unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return unit


class Gate:
    """Holds up whoever calls it until it is opened, and keeps what each call was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, given: object = None) -> None:
        self.calls.append(given)
        self.reached.set()
        assert self._open.wait(60), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self.calls.clear()
        self.reached.clear()
        self._open.clear()
