"""The registry: SQL as the truth, and a vector index that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from sqlalchemy import Engine

from lora_hub_sdk.config import cache_home
from lora_hub_sdk.errors import ConfigurationError, EncoderMismatchError, NameTakenError, RetiredError
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.registry.api_keys import ApiKeys
from lora_hub_sdk.registry.follower import Follower, Progress, Verification
from lora_hub_sdk.registry.followers import Followers
from lora_hub_sdk.registry.index import Vector, is_same
from lora_hub_sdk.registry.index_places import open_index
from lora_hub_sdk.registry.queries import RuleKind
from lora_hub_sdk.registry.records import Registration, vector_of
from lora_hub_sdk.registry.schema import ensure_schema, open_database, sqlite_file
from lora_hub_sdk.registry.store import SqlStore
from lora_hub_sdk.types import Adapter, AdapterFilter, AdapterState, Event, Hit, Score

#: Adapters that a guess goes by; more would make it slower, not better.
_MOST_KNOWN: Final = 2000


class Registry:
    """Adapters with their revisions, samples, vectors, scores and history. Thread-safe.

    Args:
        database: a file, ":memory:", or an SQLAlchemy URL.
        index: a folder, "exact", "http://host:port" of a Chroma server, or None for a folder beside the database.
        encoder: gives the fingerprint of the encoder whose vectors are searched; asked at every use of the index, so
            that listing adapters needs no encoder, and another one may come in its place.
        actor: who is written into the events.

    Raises:
        SchemaError: the database is of another version.
    """

    def __init__(
        self, database: str, *, index: str | Path | None, encoder: Callable[[], str], actor: str = "unknown"
    ) -> None:
        self._engine = open_database(database)
        ensure_schema(self._engine)
        self.store = SqlStore(self._engine, actor)
        self.keys = ApiKeys(self._engine)
        self._place = index if index is not None else _beside(self._engine, self.store.registry_id)
        self._ask_encoder = encoder
        self._followers = Followers(self._follow)

    @property
    def _encoder(self) -> str:
        return self._ask_encoder()

    @property
    def _follower(self) -> Follower:
        with self._followers.lend(self._encoder) as follower:
            return follower

    def _follow(self, encoder: str) -> Follower:
        name = f"hub-{self.store.registry_id[:12]}-{encoder[:24]}"
        return Follower(self.store, lambda: open_index(self._place, name), encoder)

    @property
    def digest(self) -> str:
        """Changes whenever an answer of ``search`` may have changed."""
        return f"{self.store.registry_id}:{self.store.version()}:{self._encoder[:16]}"

    # -- registering and changing -------------------------------------------------------------------------------------

    def add(self, registration: Registration) -> Adapter:
        """Register; the same content under the same name changes nothing and returns what is there.

        Raises:
            NameTakenError: the name belongs to other content.
            EncoderMismatchError: the vector is of another encoder.
        """
        self._check_encoder(registration)
        if self.store.find(registration.name, registration.namespace) is None:
            try:
                return self.store.add(registration)
            except NameTakenError:
                pass  # somebody was first; perhaps with the same
        known = self.store.get(registration.name, registration.namespace)
        self.check_content(known, registration.admitted.digest)
        self._check_representation(known, registration)
        return known

    def check_content(self, known: Adapter, digest: str) -> None:
        """Refuse other content under the name of an adapter.

        Raises:
            NameTakenError: says what there is, and what to do.
        """
        if known.digest != digest:
            raise NameTakenError(
                f"{known.name!r} is registered with content {known.digest[:12]} (revision {known.revision[:12]}), and "
                f"{digest[:12]} was asked for; move it by hub.update({known.name!r}), remove it first, or give the new "
                "one another name"
            )

    def has_samples(self, known: Adapter, texts: tuple[str, ...]) -> bool:
        """Whether these very texts were kept with an adapter."""
        return known.origin == "samples" and self.store.samples(known) == texts

    def replace(self, known: Adapter, registration: Registration) -> Adapter:
        """Move an adapter to another revision, in one step; without a representation, samples and vectors stay.

        Raises:
            ConflictError, AdapterNotFoundError: somebody else changed it since ``known`` was read.
            EncoderMismatchError: the vector is of another encoder.
        """
        self._check_encoder(registration)
        return self.store.replace(known, registration)

    def keep_files(self, adapter: Adapter, folder: Path) -> Adapter:
        """Point an adapter whose files are gone at another folder that was just found to have the same content."""
        if (adapter.folder / WEIGHTS_FILE).is_file():
            return adapter
        return self.store.move(adapter, folder)

    def set_state(self, name: str, namespace: str, state: AdapterState) -> Adapter:
        """Take an adapter out of service or back into it; nothing changes where it is there already."""
        adapter = self.store.get(name, namespace)
        return adapter if adapter.state == state else self.store.set_state(adapter, state)

    def set_pinned(self, name: str, namespace: str, pinned: bool) -> Adapter:
        """Hold an adapter at its revision or let it move; nothing changes where that is so already."""
        adapter = self.store.get(name, namespace)
        return adapter if adapter.pinned == pinned else self.store.set_pinned(adapter, pinned)

    def remove(self, name: str, namespace: str) -> Adapter:
        """Remove an adapter; its files stay where they are.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        adapter = self.store.get(name, namespace)
        self.store.remove(adapter)
        return adapter

    def record_score(self, adapter: Adapter, task: str, metric: str, value: float) -> None:
        """Keep how an adapter did at a task.

        Raises:
            ConfigurationError: no name for task or metric, or a value that is no finite number.
        """
        number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
        if not number or not task.strip() or not metric.strip():
            raise ConfigurationError(
                f"a score needs a task, a metric and a finite number; found {task!r}, {metric!r}, {value!r}"
            )
        self.store.record_score(adapter, task, metric, float(value))

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, name: str, namespace: str) -> Adapter:
        """The adapter of that name, in service or not.

        Raises:
            AdapterNotFoundError: with names that look alike.
        """
        return self.store.get(name, namespace)

    def find(self, name: str, namespace: str) -> Adapter | None:
        """The adapter of that name, or None."""
        return self.store.find(name, namespace)

    def in_service(self, name: str, namespace: str) -> Adapter:
        """The adapter of that name, to be used now.

        Raises:
            AdapterNotFoundError, RetiredError: there is none, or it was taken out of service.
        """
        adapter = self.store.get(name, namespace)
        if adapter.state == "retired":
            raise RetiredError(f"{name!r} was taken out of service; hub.restore({name!r}) brings it back")
        return adapter

    def adapters(self, namespace: str | None = None, base_model: str | None = None) -> list[Adapter]:
        """Adapters by name, retired ones too."""
        return self.store.adapters(namespace, base_model)

    def base_models(self, namespace: str | None = None) -> set[str]:
        """The base models that adapters are registered for, in one namespace or in any."""
        return self.store.base_models(namespace)

    def namespaces(self) -> list[str]:
        """Every namespace that something was registered in."""
        return self.store.namespaces()

    def samples(self, adapter: Adapter) -> tuple[str, ...]:
        """The texts of an adapter that were kept."""
        return self.store.samples(adapter)

    def samples_of(self, adapters: Iterable[int], most: int) -> dict[int, tuple[str, ...]]:
        """The first ``most`` texts of each of these ids that were kept; who has none is left out."""
        return self.store.samples_of(adapters, most)

    def scores(self, adapter: Adapter) -> list[Score]:
        """Every score of an adapter, those of its current content first."""
        return self.store.scores(adapter)

    def events(self, name: str | None, namespace: str | None, limit: int) -> list[Event]:
        """The latest events, newest first.

        Raises:
            ConfigurationError: a limit below 1.
        """
        if limit < 1:
            raise ConfigurationError(f"limit={limit}: expected 1 or more")
        return self.store.events(name, namespace, limit)

    # -- searching ----------------------------------------------------------------------------------------------------

    def search(
        self, vectors: Sequence[Vector], k: int, allowed: AdapterFilter, encoder: str | None = None
    ) -> list[list[Hit]]:
        """For each vector the up to k nearest adapters that the filter lets through; see ``Follower.search``.

        Args:
            encoder: fingerprint of the encoder that made the vectors, where that may have been replaced since.
        """
        with self._followers.lend(encoder or self._encoder) as follower:
            return follower.search(vectors, k, allowed)

    def vector(self, adapter: Adapter) -> Vector | None:
        """An adapter's vector under the current encoder."""
        content = self.store.vector(adapter, self._encoder)
        return None if content is None else vector_of(content)

    def known(self, namespace: str, base_model: str, encoder: str | None = None) -> list[tuple[Path, Vector]]:
        """Folders and vectors, under this or another encoder, of adapters that a guess can go by, the latest first."""
        return self.store.known(namespace, base_model, encoder or self._encoder, _MOST_KNOWN)

    def rule(self, kind: RuleKind, namespace: str, encoder: str) -> str | None:
        """What was learned for a namespace with the encoder of a fingerprint; None where nothing was."""
        return self.store.rule(kind, namespace, encoder)

    def keep_rule(self, kind: RuleKind, namespace: str, encoder: str, rule: str) -> None:
        """Keep what was learned for a namespace with the encoder of a fingerprint."""
        self.store.keep_rule(kind, namespace, encoder, rule)

    def verify(self) -> Verification:
        """Compare every vector of the index with SQL's; see ``Follower.verify``."""
        return self._follower.verify()

    def reindex(self, progress: Progress | None = None) -> int:
        """Write every vector of the index anew from SQL; see ``Follower.reindex``."""
        return self._follower.reindex(progress)

    def close(self) -> None:
        """Release the database and the index."""
        self._followers.close()
        self.store.close()

    def _check_encoder(self, registration: Registration) -> None:
        given = registration.representation
        if given is not None and given.encoder != self._encoder:
            raise EncoderMismatchError(
                f"{registration.name!r} brings a vector of encoder {given.encoder[:12]}, this registry searches with "
                f"{self._encoder[:12]}"
            )

    def _check_representation(self, known: Adapter, registration: Registration) -> None:
        """The same samples, or at least the same vector."""
        given = registration.representation
        assert given is not None
        if given.texts and known.origin == given.origin and self.store.samples(known) == given.texts:
            return
        content = self.store.vector(known, given.encoder)
        held = None if content is None else vector_of(content)
        if held is None or not is_same(held, given.vector):
            how = f"{known.sample_count} other samples" if known.sample_count else "another vector"
            raise NameTakenError(
                f"{known.name!r} is registered with {how}; replace them by hub.update({known.name!r}, samples=...), "
                "remove it first, or give the new one another name"
            )


def _beside(engine: Engine, registry_id: str) -> Path | None:
    """The index's own place: beside a SQLite file, in memory with a database in memory, else in the user's cache."""
    if engine.dialect.name != "sqlite":
        return cache_home() / "index" / registry_id
    file = sqlite_file(engine.url)
    return None if file is None else file.with_name(f"{file.name}.index")
