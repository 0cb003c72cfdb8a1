"""The vector index: a contract, and Chroma behind it. It is a cache of SQL and may be thrown away at any time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import numpy as np

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.registry.store import Embedding, Vector

#: Chroma refuses more rows than this in one call (its SQLite has a limit on variables).
_ROWS_PER_CALL: Final = 5000
#: How many candidates HNSW keeps while it searches; its default loses half of the neighbours of unclustered vectors.
_EF_SEARCH: Final = 1000


@dataclass(frozen=True, slots=True)
class IndexFilter:
    """Which vectors a search may return. ``only`` and ``exclude`` are adapter ids."""

    namespace: str
    base_model: str | None = None
    only: frozenset[int] | None = None
    exclude: frozenset[int] = frozenset()


class VectorIndex(Protocol):
    """Vectors of one encoder, by key. Implementations are thread-safe; writing a key twice is harmless."""

    def put(self, embeddings: Sequence[Embedding]) -> None:
        """Insert or replace."""

    def delete(self, keys: Collection[str]) -> None:
        """Remove; keys that are not there are ignored."""

    def keys(self) -> set[str]:
        """All keys, to be compared with SQL's."""

    def search(self, vectors: Sequence[Vector], count: int, allowed: IndexFilter) -> list[list[tuple[str, float]]]:
        """For each vector up to ``count`` (key, cosine) pairs, nearest first."""

    def close(self) -> None:
        """Release what the index holds open."""


def key_of(embedding: Embedding) -> str:
    """The key of a vector: its adapter's id and a digest of the vector, so that a changed vector is another key.

    Comparing keys with SQL therefore proves agreement without reading any vector.
    """
    import hashlib

    return f"{embedding.adapter_id}-{hashlib.sha256(embedding.vector.tobytes()).hexdigest()[:16]}"


def adapter_id_of(key: str) -> int:
    """The adapter's id within a key."""
    return int(key.partition("-")[0])


class ChromaIndex:
    """Chroma, embedded (a folder, or memory) or as a server; cosine space, one collection per encoder.

    The embedded client serves one process at a time: a second one reads stale without an error. Several processes need
    a Chroma server.
    """

    def __init__(self, location: str | Path | None, collection: str) -> None:
        import chromadb
        from chromadb.config import Settings

        settings = Settings(anonymized_telemetry=False)
        if location is None:
            self._client: Any = chromadb.EphemeralClient(settings=settings)
        elif isinstance(location, str) and "://" in location:
            address = urlsplit(location)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ConfigurationError(
                    f"index={location!r}: expected a folder, or http://host:port of a Chroma server"
                )
            self._client = chromadb.HttpClient(
                host=address.hostname,
                port=address.port or (443 if address.scheme == "https" else 8000),
                ssl=address.scheme == "https",
                settings=settings,
            )
        else:
            self._client = chromadb.PersistentClient(str(location), settings=settings)
        self._collection: Any = self._client.get_or_create_collection(
            collection,
            embedding_function=None,
            configuration={"hnsw": {"space": "cosine", "ef_search": _EF_SEARCH}},
        )

    def put(self, embeddings: Sequence[Embedding]) -> None:
        for start in range(0, len(embeddings), _ROWS_PER_CALL):
            part = embeddings[start : start + _ROWS_PER_CALL]
            self._collection.upsert(
                ids=[key_of(embedding) for embedding in part],
                embeddings=np.stack([embedding.vector for embedding in part]),
                metadatas=[
                    {
                        "adapter": embedding.adapter_id,
                        "namespace": embedding.namespace,
                        "base_model": embedding.base_model,
                    }
                    for embedding in part
                ],
            )

    def delete(self, keys: Collection[str]) -> None:
        gone = sorted(keys)
        for start in range(0, len(gone), _ROWS_PER_CALL):
            self._collection.delete(ids=gone[start : start + _ROWS_PER_CALL])

    def keys(self) -> set[str]:
        return set(self._collection.get(include=[])["ids"])

    def search(self, vectors: Sequence[Vector], count: int, allowed: IndexFilter) -> list[list[tuple[str, float]]]:
        if not len(vectors) or count < 1 or (allowed.only is not None and not allowed.only):
            return [[] for _ in vectors]
        found = self._collection.query(
            query_embeddings=np.stack(list(vectors)),
            n_results=count,
            where=_where(allowed),
            include=["distances"],
        )
        return [
            [(key, 1.0 - float(distance)) for key, distance in zip(keys, distances, strict=True)]
            for keys, distances in zip(found["ids"], found["distances"], strict=True)
        ]

    def close(self) -> None:
        self._client.close()


def _where(allowed: IndexFilter) -> dict[str, Any]:
    conditions: list[dict[str, Any]] = [{"namespace": allowed.namespace}]
    if allowed.base_model is not None:
        conditions.append({"base_model": allowed.base_model})
    if allowed.only is not None:
        conditions.append({"adapter": {"$in": sorted(allowed.only)}})
    if allowed.exclude:
        conditions.append({"adapter": {"$nin": sorted(allowed.exclude)}})
    return conditions[0] if len(conditions) == 1 else {"$and": conditions}
