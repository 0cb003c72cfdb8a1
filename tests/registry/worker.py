"""What the processes of the crash and crowd tests share: one registry, an encoder that is there at once, and calls."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lora_hub_sdk.hub import LoraHub

_DIMENSION: Final = 64
Kind = Literal["register", "update", "remove", "retire", "restore", "score", "search", "gc"]


def forking() -> ForkServerContext:
    """Processes that are forked off one that has imported everything and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry.zygote"])
    return context


class HashEncoder:
    """An ``Encoder`` that hashes a text to a random direction: the same in every process, and loaded at once."""

    name = "hash"
    fingerprint = hashlib.sha256(b"hash").hexdigest()
    dimension = _DIMENSION

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts]
        vectors = np.array([np.random.default_rng(seed).standard_normal(_DIMENSION) for seed in seeds])
        vectors = vectors.reshape(len(texts), _DIMENSION)
        unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return unit


@dataclass(frozen=True, slots=True)
class Place:
    """Where a registry of a test lies; every process opens the same."""

    database: str
    cache: Path
    endpoint: str
    index: str | None = None

    def open(self, actor: str) -> LoraHub:
        return LoraHub(
            self.database,
            index=self.index,
            encoder=HashEncoder(),
            cache_dir=self.cache,
            endpoint=self.endpoint,
            actor=actor,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a hub. ``source`` is what is registered: a repository or a folder."""

    kind: Kind
    name: str = ""
    source: str = ""
    revision: str | None = None
    samples: tuple[str, ...] | None = None

    def make(self, hub: LoraHub) -> object:
        match self.kind:
            case "register":
                return hub.register(self.source, name=self.name, revision=self.revision, samples=self.samples)
            case "update":
                return hub.update(self.name, revision=self.revision, samples=self.samples)
            case "remove":
                return hub.remove(self.name)
            case "retire":
                return hub.retire(self.name)
            case "restore":
                return hub.restore(self.name)
            case "score":
                return hub.record_score(self.name, "task", "exact", 0.5)
            case "search":
                return hub.search((self.samples or ("anything",))[0])
            case "gc":
                return hub.gc()
