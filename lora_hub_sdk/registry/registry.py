"""The registry: SQL as the truth, a vector index that follows it, and one lock around both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from sqlalchemy import Engine

from lora_hub_sdk.config import cache_home
from lora_hub_sdk.errors import EncoderMismatchError, NameTakenError
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.registry.index import ChromaIndex, IndexFilter, VectorIndex, adapter_id_of, key_of
from lora_hub_sdk.registry.schema import ensure_schema, open_database, sqlite_file
from lora_hub_sdk.registry.store import Embedding, Registration, SqlStore, Vector
from lora_hub_sdk.types import Adapter, Hit

#: Fetched beyond k, so that equal scores at the edge are ordered by name and not by the index's chance.
_TIE_MARGIN: Final = 16
_SCORE_DIGITS: Final = 6
#: A vector given again may have been normalised elsewhere.
_VECTOR_TOLERANCE: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the vector index holds exactly the vectors of SQL. Keys are ``<adapter id>-<digest of the vector>``.

    ``unembedded`` names adapters that no search can find, as they have no vector under the current encoder.
    """

    vectors: int
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    unembedded: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return not self.missing and not self.surplus


class Registry:
    """Adapters with their samples and vectors. Thread-safe.

    A write commits to SQL first and then follows in the index. A crash between the two leaves a complete adapter in
    SQL; the index is compared with SQL, by keys that contain a digest of each vector, before its first use.

    Args:
        database: a file, ":memory:", or an SQLAlchemy URL.
        index: a folder, "http://host:port" of a Chroma server, or None for a place beside the database.
        encoder: gives the fingerprint of the encoder whose vectors are searched; asked on the first use of the index,
            so that listing adapters needs no encoder.

    Raises:
        SchemaError: the database is of another version.
    """

    def __init__(self, database: str, *, index: str | Path | None, encoder: Callable[[], str]) -> None:
        self._engine = open_database(database)
        ensure_schema(self._engine)
        self._store = SqlStore(self._engine)
        self._place = index if index is not None else _beside(self._engine, self._store.registry_id)
        self._ask_encoder = encoder
        self._lock = threading.RLock()
        # The version of SQL that the index was last seen to agree with.
        self._synced: int | None = None

    @cached_property
    def _encoder(self) -> str:
        return self._ask_encoder()

    @cached_property
    def _index(self) -> VectorIndex:
        return ChromaIndex(self._place, f"hub-{self._store.registry_id[:12]}-{self._encoder[:24]}")

    @property
    def _index_is_open(self) -> bool:
        return "_index" in self.__dict__

    @property
    def digest(self) -> str:
        """Changes whenever an answer of ``search`` may have changed."""
        return f"{self._store.registry_id}:{self._store.version()}:{self._encoder[:16]}"

    def add(self, registration: Registration) -> Adapter:
        """Register; the same content under the same name changes nothing and returns what is there.

        Raises:
            NameTakenError: the name belongs to other content.
            EncoderMismatchError: the vector is of another encoder.
        """
        if registration.encoder != self._encoder:
            raise EncoderMismatchError(
                f"{registration.name!r} brings a vector of encoder {registration.encoder[:12]}, this registry searches "
                f"with {self._encoder[:12]}"
            )
        with self._lock:
            by_samples = registration.origin == "samples"
            known = self.find_same(
                registration.name,
                registration.namespace,
                registration.admitted.digest,
                registration.samples if by_samples else None,
            )
            if known is not None:
                if not by_samples:
                    self._require_same_vector(known, registration.vector)
                return known
            self._sync_index()
            before, self._synced = self._synced, None
            adapter, version = self._store.add(registration)
            self._index.put(self._store.embeddings(self._encoder, adapter))
            self._synced = _next(before, version)
            return adapter

    def get(self, name: str, namespace: str) -> Adapter:
        """The adapter of that name.

        Raises:
            AdapterNotFoundError: with names that look alike.
        """
        return self._store.get(name, namespace)

    def find_same(self, name: str, namespace: str, digest: str, samples: tuple[str, ...] | None) -> Adapter | None:
        """The adapter of that name if it has this content and, where given, these samples; None where the name is free.

        Raises:
            NameTakenError: the name belongs to something else.
        """
        known = self._store.find(name, namespace)
        if known is None:
            return None
        if known.digest != digest:
            raise NameTakenError(
                f"{name!r} is registered with content {known.digest[:12]} (revision {known.revision[:12]}), asked for "
                f"was {digest[:12]}; remove it first, or give the new one another name"
            )
        if samples is not None and self._store.samples(known) != samples:
            raise NameTakenError(
                f"{name!r} is registered with {known.sample_count} other samples; remove it first, or give the new one "
                "another name"
            )
        return known

    def keep_files(self, adapter: Adapter, folder: Path) -> Adapter:
        """Point an adapter whose files are gone at another folder that was just found to have the same content."""
        if (adapter.folder / WEIGHTS_FILE).is_file():
            return adapter
        return self._store.move(adapter, folder)

    def adapters(self, namespace: str | None = None, base_model: str | None = None) -> list[Adapter]:
        """Adapters by name."""
        return self._store.adapters(namespace, base_model)

    def base_models(self) -> set[str]:
        """The base models that adapters are registered for."""
        return self._store.base_models()

    def samples(self, adapter: Adapter) -> tuple[str, ...]:
        """The texts that an adapter was registered with."""
        return self._store.samples(adapter)

    def remove(self, name: str, namespace: str) -> Adapter:
        """Remove an adapter; its files stay where they are.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        with self._lock:
            adapter = self._store.get(name, namespace)
            if not self._index_is_open:  # it follows before it is first used; until then no encoder is needed
                self._store.remove(adapter)
                return adapter
            keys = [key_of(embedding) for embedding in self._store.embeddings(self._encoder, adapter)]
            before, self._synced = self._synced, None
            version = self._store.remove(adapter)
            self._index.delete(keys)
            self._synced = _next(before, version)
            return adapter

    def unembedded(self) -> list[Adapter]:
        """Adapters whose vectors belong to other encoders than this registry's."""
        return self._store.without_embedding(self._encoder)

    def add_embedding(self, adapter: Adapter, encoder_name: str, vector: Vector) -> None:
        """Give an adapter its vector under this registry's encoder."""
        with self._lock:
            self._synced = None
            self._store.add_embedding(adapter, self._encoder, encoder_name, vector)

    def search(
        self,
        vectors: Sequence[Vector],
        k: int,
        *,
        namespace: str,
        base_model: str | None = None,
        tags: Collection[str] = (),
        exclude: Collection[str] = (),
    ) -> list[list[Hit]]:
        """For each vector the up to k nearest adapters, best first; equal scores in the order of names.

        Args:
            tags: only adapters that carry all of these.
            exclude: names never to return.

        Raises:
            EncoderMismatchError: adapters wait to be embedded by the current encoder.
        """
        with self._lock:
            self._sync_index()
            allowed = self._allowed(namespace, base_model, tags, exclude)
            found = self._index.search(vectors, k + _TIE_MARGIN, allowed)
        adapters = self._store.by_ids({adapter_id_of(key) for row in found for key, _ in row})
        return [_ranked(row, adapters)[:k] for row in found]

    def verify(self) -> Verification:
        """Compare the index with SQL as they are now, mending nothing."""
        with self._lock:
            wanted, held = set(self._wanted()), self._index.keys()
        return Verification(
            len(wanted),
            tuple(sorted(wanted - held)),
            tuple(sorted(held - wanted)),
            tuple(adapter.name for adapter in self.unembedded()),
        )

    def reindex(self) -> int:
        """Write the whole index anew from SQL; returns the number of vectors."""
        with self._lock:
            self._index.delete(self._index.keys())
            self._synced = None
            self._sync_index()
            return len(self._index.keys())

    def close(self) -> None:
        """Release the database and the index."""
        with self._lock:
            if self._index_is_open:
                self._index.close()
            self._store.close()

    def _require_same_vector(self, known: Adapter, vector: Vector) -> None:
        held = self._store.embeddings(self._encoder, known)
        if not held or not np.allclose(held[0].vector, vector, atol=_VECTOR_TOLERANCE):
            raise NameTakenError(
                f"{known.name!r} is registered with another vector; remove it first, or give the new one another name"
            )

    def _allowed(
        self, namespace: str, base_model: str | None, tags: Collection[str], exclude: Collection[str]
    ) -> IndexFilter:
        if not tags and not exclude:
            return IndexFilter(namespace, base_model)
        candidates = self._store.adapters(namespace, base_model)
        only = {adapter.id for adapter in candidates if set(tags) <= set(adapter.tags)} if tags else None
        unwanted = {adapter.id for adapter in candidates if adapter.name in set(exclude)}
        if only is not None:
            return IndexFilter(namespace, base_model, frozenset(only - unwanted))
        return IndexFilter(namespace, base_model, exclude=frozenset(unwanted))

    def _wanted(self) -> dict[str, Embedding]:
        return {key_of(embedding): embedding for embedding in self._store.embeddings(self._encoder)}

    def _sync_index(self) -> None:
        """Bring the index to what SQL says, if anything was written since the two last agreed, by whomever."""
        version = self._store.version()
        if version == self._synced:
            return
        waiting = [adapter.name for adapter in self.unembedded() if adapter.sample_count]
        if waiting:
            raise EncoderMismatchError(
                f"{len(waiting)} adapters have no vector under the current encoder ({', '.join(waiting[:3])}...); run "
                "hub.reindex() or `lora-hub reindex`, or open the hub with the encoder they were registered with"
            )
        wanted, held = self._wanted(), self._index.keys()
        self._index.delete(held - wanted.keys())
        self._index.put([embedding for key, embedding in wanted.items() if key not in held])
        self._synced = version


def _next(before: int | None, version: int) -> int | None:
    """The version that the index agrees with after a write of our own; None if somebody else wrote in between."""
    return version if before == version - 1 else None


def _ranked(row: Sequence[tuple[str, float]], adapters: dict[int, Adapter]) -> list[Hit]:
    hits = [
        Hit(adapters[adapter_id_of(key)], max(-1.0, min(1.0, score)))
        for key, score in row
        if adapter_id_of(key) in adapters
    ]
    return sorted(hits, key=lambda hit: (-round(hit.score, _SCORE_DIGITS), hit.adapter.name))


def _beside(engine: Engine, registry_id: str) -> Path | None:
    """The index's own place: beside a SQLite file, in memory with a database in memory, else in the user's cache."""
    if engine.dialect.name != "sqlite":
        return cache_home() / "index" / registry_id
    file = sqlite_file(engine.url)
    return None if file is None else file.with_name(f"{file.name}.index")
