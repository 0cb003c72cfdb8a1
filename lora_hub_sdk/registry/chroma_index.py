"""Chroma as a vector index: one collection for each namespace and base model, and one that knows them all."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from lora_hub_sdk.errors import ConfigurationError, IndexDamagedError, RegistryError
from lora_hub_sdk.registry.chroma_client import ChromaClient, is_failure
from lora_hub_sdk.registry.index import Entry, IndexFilter, Vector, adapter_id_of, best

_T = TypeVar("_T")
_Rows = list[list[tuple[str, float]]]

#: Chroma refuses more rows than about this in one call (its SQLite has a limit on variables).
_ROWS_PER_CALL: Final = 5000
#: Collections listed at a time.
_PAGE: Final = 500
#: The graph of neighbours. Chroma's defaults lose half of the neighbours of unclustered vectors.
_HNSW: Final = {"space": "cosine", "max_neighbors": 32, "ef_construction": 100, "ef_search": 4500}
#: Beyond this many the graph's own recall falls, and reading the allowed vectors is cheaper.
_MOST_CANDIDATES: Final = 1000
#: How often somebody else may delete what we look at before we give up.
_TRIES: Final = 5
#: Room for "-" and 16 hexadecimal digits within the 63 characters that Chroma allows.
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,45}")


class ChromaIndex:
    """A ``VectorIndex`` in Chroma.

    Chroma filters by metadata slowly, so namespace and base model are collections of their own ("partitions"). A root
    collection holds a record of each partition, and the stamp. Adapter ids are metadata.

    Other processes may write to the same server at any time: a partition becomes visible when it is recorded, and what
    somebody deleted under us is looked up again.

    Args:
        client: where Chroma runs; closed with this index.
        name: tells this index from others in the same place; at most 46 characters.

    Raises:
        ConfigurationError: a name that Chroma would refuse.
    """

    def __init__(self, client: ChromaClient, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"index name {name!r}: expected 2 to 46 letters, digits, '.', '_' or '-'")
        self._client = client
        self.is_shared = client.is_shared
        self._name = name
        self._root_name = f"{name}-root"
        self._session: _Session | None = None
        self._witness: UUID | None = None
        self._closed = False

    def put(self, entries: Sequence[Entry]) -> None:
        """Insert; where a partition is new, its record follows its vectors."""
        places: dict[tuple[str, str], dict[str, Entry]] = {}
        for entry in entries:
            places.setdefault((entry.namespace, entry.base_model), {})[entry.key] = entry

        def write(session: _Session) -> None:
            for (namespace, base_model), by_key in places.items():
                about = {"namespace": namespace, "base_model": base_model}
                collection = session.create(self._partition_name(namespace, base_model), about)
                for part in _parts(list(by_key.values())):
                    collection.upsert(
                        ids=[entry.key for entry in part],
                        embeddings=np.stack([entry.vector for entry in part]),
                        metadatas=[{"adapter": entry.adapter_id} for entry in part],
                    )
            self._record(session, list(places))

        if places:
            self._run(f"writing {len(entries)} vectors", write)

    def delete(self, keys: Collection[str]) -> None:
        """Remove from whichever partitions hold them."""

        def remove(session: _Session) -> None:
            for collection in self._partitions(session):
                for part in _parts(list(keys)):
                    # Asked first, because deleting what is not there costs as much as deleting.
                    held = collection.get(ids=part, include=[])["ids"]
                    if held:
                        collection.delete(ids=held)

        if keys:
            self._run(f"deleting {len(keys)} vectors", remove)

    def count(self) -> int:
        """How many vectors there are; about a millisecond a partition."""
        return self._run("counting", lambda session: sum(int(held.count()) for held in self._partitions(session)))

    def keys(self) -> set[str]:
        """All keys."""
        return self._run(
            "listing the keys",
            lambda session: {str(key) for held in self._partitions(session) for key in held.get(include=[])["ids"]},
        )

    def read(self, keys: Sequence[str]) -> dict[str, Vector]:
        """The vectors as they are stored; keys that are not there are left out."""

        def look_up(session: _Session) -> dict[str, Vector]:
            found: dict[str, Vector] = {}
            for collection in self._partitions(session):
                for part in _parts(list(dict.fromkeys(keys))):
                    held = collection.get(ids=part, include=["embeddings"])
                    found.update(zip(held["ids"], np.asarray(held["embeddings"], np.float32), strict=True))
            return found

        return self._run(f"reading {len(keys)} vectors", look_up) if keys else {}

    def search(self, vectors: Sequence[Vector], count: int, allowed: IndexFilter) -> list[list[tuple[str, float]]]:
        """For each vector up to ``count`` (key, cosine) pairs, nearest first."""
        only = None if allowed.only is None else allowed.only - allowed.exclude
        if not len(vectors) or count < 1 or (only is not None and not only):
            return [[] for _ in vectors]
        queries = np.stack(list(vectors))

        def find(session: _Session) -> _Rows:
            partitions = self._partitions(session, allowed.namespace, allowed.base_model)
            if only is not None:
                return _among(partitions, queries, count, only)
            found = [_without(held, queries, count, allowed.exclude) for held in partitions]
            return _merged(found, len(queries), count)

        found = self._run("searching", find)
        self._client.settle()
        return found

    def stamp(self) -> int | None:
        """The version of SQL that this index was last said to contain in full; None where nobody said so."""

        def read_stamp(session: _Session) -> int | None:
            root = session.create(self._root_name, fresh=True)
            self._witness = root.id
            stamp = (root.metadata or {}).get("stamp")
            return None if stamp is None else int(stamp)

        return self._run("reading the stamp", read_stamp)

    def set_stamp(self, version: int) -> None:
        """Say that everything up to this version of SQL is in the index.

        Where somebody cleared the index since ``stamp`` was last asked, that is no longer so, and nothing is written.
        """

        def write_stamp(session: _Session) -> None:
            root = session.create(self._root_name, fresh=True)
            if self._witness in (None, root.id):
                root.modify(metadata={"stamp": version})

        self._run("writing the stamp", write_stamp)

    def clear(self) -> None:
        """Remove everything, the stamp included, also where nothing can be read any more.

        In a folder this empties Chroma's whole folder, indexes of other names included.
        """

        def drop(session: _Session) -> None:
            ours = re.compile(rf"{re.escape(self._name)}-(root|[0-9a-f]{{16}})")
            # The root goes first: from then on no stamp speaks of what is left.
            for name in sorted(filter(ours.fullmatch, session.names()), key=lambda name: name != self._root_name):
                session.drop(name)

        self._session = self._witness = None
        try:
            wiped = self._client.wipe()
        except OSError as error:
            raise self._client.failure("deleting the files", error) from error
        if not wiped:
            self._run("clearing", drop)
            self._session = None

    def close(self) -> None:
        """Release the folder or the connection; the content stays."""
        if not self._closed:
            self._closed, self._session = True, None
            self._client.close()

    # -- within --------------------------------------------------------------------------------------------------

    def _partition_name(self, namespace: str, base_model: str) -> str:
        return f"{self._name}-{_partition_id(namespace, base_model)}"

    def _partitions(self, session: _Session, namespace: str | None = None, base_model: str | None = None) -> list[Any]:
        """The collections of a namespace and a base model, or of all."""
        if namespace is not None and base_model is not None:
            ids = [_partition_id(namespace, base_model)]
        else:
            # Asked each time (a millisecond or two), because others may have added some.
            root = session.find(self._root_name)
            where = None if namespace is None else {"namespace": namespace}
            ids = [] if root is None else root.get(where=where, include=[])["ids"]
        found = [session.find(f"{self._name}-{partition}") for partition in ids]
        return [collection for collection in found if collection is not None]

    def _record(self, session: _Session, places: Sequence[tuple[str, str]]) -> None:
        # After the vectors: had somebody cleared in between, a record of nothing would do no harm, while vectors
        # without a record would be found by no comparison with SQL.
        root = session.create(self._root_name, fresh=True)
        missing = [place for place in places if (root.id, place) not in session.recorded]
        if missing:
            root.upsert(
                ids=[_partition_id(*place) for place in missing],
                embeddings=np.ones((len(missing), 1), np.float32),
                metadatas=[{"namespace": namespace, "base_model": base} for namespace, base in missing],
            )
            session.recorded.update((root.id, place) for place in missing)

    def _run(self, asked: str, action: Callable[[_Session], _T]) -> _T:
        """Do it, again where somebody deleted or made a collection meanwhile; failures leave as our errors."""
        tries = _TRIES
        while True:
            try:
                return action(self._current())
            except BaseException as error:
                if not is_failure(error) or isinstance(error, RegistryError):
                    raise
                tries -= 1
                # By name, to leave chromadb unimported: importing it may be what failed.
                moved = type(error).__name__ in ("NotFoundError", "UniqueConstraintError", "IDAlreadyExistsError")
                # A search that found what somebody deletes in the same moment.
                moved = moved or "Error finding id" in str(error)
                if not tries or not moved:
                    raise self._client.failure(asked, error) from error
                self._session = None

    def _current(self) -> _Session:
        client, session = self._client.connect(), self._session
        if session is not None and session.client is not client:
            self._session = None
            raise IndexDamagedError("the vector index was emptied by another one in the same folder; fill it again")
        if session is None:
            session = self._session = _Session(client)
        return session


@dataclass(slots=True)
class _Session:
    """One chromadb client with the collections that were seen through it. Losing it costs some look-ups."""

    client: Any
    recorded: set[tuple[UUID, tuple[str, str]]] = field(default_factory=set)
    _collections: dict[str, Any] = field(default_factory=dict)

    def find(self, name: str) -> Any | None:
        """The collection, as it was last seen; None where there is none. Nothing is remembered of the latter."""
        if name not in self._collections:
            from chromadb.errors import NotFoundError

            try:
                self._collections[name] = self.client.get_collection(name, embedding_function=None)
            except NotFoundError:
                return None
        return self._collections[name]

    def create(self, name: str, about: dict[str, str] | None = None, *, fresh: bool = False) -> Any:
        """The collection, made where there is none; ``fresh`` asks also where it was seen before."""
        if fresh or name not in self._collections:
            self._collections[name] = self.client.get_or_create_collection(
                name, metadata=about, embedding_function=None, configuration={"hnsw": dict(_HNSW)}
            )
        return self._collections[name]

    def names(self) -> list[str]:
        """The names of all collections in this place, ours or not."""
        found: list[str] = []
        while True:
            page = self.client.list_collections(limit=_PAGE, offset=len(found))
            found.extend(collection.name for collection in page)
            if len(page) < _PAGE:
                return found

    def drop(self, name: str) -> None:
        from chromadb.errors import NotFoundError

        try:
            self.client.delete_collection(name)
        except NotFoundError:
            return


def _without(collection: Any, queries: NDArray[np.float32], count: int, exclude: Collection[int]) -> _Rows:
    """The nearest that are not excluded, of as many candidates more as there are excluded adapters."""
    wanted = count + len(exclude)
    while True:
        rows, full = _nearest(collection, queries, wanted)
        found = [[pair for pair in row if _adapter(pair) not in exclude][:count] for row in rows]
        if not full or all(len(row) == count for row in found):
            return found
        wanted *= 4


def _among(partitions: Sequence[Any], queries: NDArray[np.float32], count: int, only: Collection[int]) -> _Rows:
    """The nearest of some adapters, out of the nearest of all where these suffice, else by reading their vectors."""
    wanted = max(count, math.ceil(2 * count * sum(held.count() for held in partitions) / len(only)))
    if wanted <= _MOST_CANDIDATES:
        seen = [_nearest(held, queries, wanted)[0] for held in partitions]
        found = _merged([[_allowed(row, only) for row in rows] for rows in seen], len(queries), count)
        # Nothing nearer can be left in a partition, if the worst of all that it showed is farther than the last found.
        worst = [
            max((rows[row][-1][1] for rows in seen if len(rows[row]) == wanted), default=-1.0)
            for row in range(len(queries))
        ]
        if all(len(row) == count and row[-1][1] >= limit for row, limit in zip(found, worst, strict=True)):
            return found
    return _merged([_read_among(held, queries, count, only) for held in partitions], len(queries), count)


def _read_among(collection: Any, queries: NDArray[np.float32], count: int, only: Collection[int]) -> _Rows:
    found: _Rows = [[] for _ in queries]
    for part in _parts(sorted(only)):
        held = collection.get(where={"adapter": {"$in": part}}, include=["embeddings"])
        if held["ids"]:
            scores = queries @ np.asarray(held["embeddings"], np.float32).T
            found = [
                best([*row, *zip(held["ids"], map(float, line), strict=True)], count)
                for row, line in zip(found, scores, strict=True)
            ]
    return found


def _allowed(row: Sequence[tuple[str, float]], only: Collection[int]) -> list[tuple[str, float]]:
    return [pair for pair in row if _adapter(pair) in only]


def _nearest(collection: Any, queries: NDArray[np.float32], count: int) -> tuple[_Rows, bool]:
    """(key, cosine) pairs, and whether the collection may hold more."""
    found = collection.query(query_embeddings=queries, n_results=count, include=["distances"])
    rows = [
        [(key, 1.0 - float(distance)) for key, distance in zip(keys, distances, strict=True)]
        for keys, distances in zip(found["ids"], found["distances"], strict=True)
    ]
    return rows, any(len(row) == count for row in rows)


def _merged(found: Sequence[_Rows], queries: int, count: int) -> _Rows:
    if len(found) == 1:
        return [row[:count] for row in found[0]]
    return [best([pair for rows in found for pair in rows[row]], count) for row in range(queries)]


def _adapter(pair: tuple[str, float]) -> int:
    return adapter_id_of(pair[0])


def _partition_id(namespace: str, base_model: str) -> str:
    return hashlib.sha256(f"{namespace}\0{base_model}".encode()).hexdigest()[:16]


def _parts(items: list[_T]) -> Iterator[list[_T]]:
    return (items[start : start + _ROWS_PER_CALL] for start in range(0, len(items), _ROWS_PER_CALL))
