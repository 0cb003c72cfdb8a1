"""What SQL is asked: adapters, their samples, vectors, scores and history. Nothing is written here."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Engine, Select, exists, select
from sqlalchemy.orm import Session

from lora_hub_sdk.errors import AdapterNotFoundError
from lora_hub_sdk.registry.index import Entry, Vector, embedding_id_of, key_of
from lora_hub_sdk.registry.naming import can_be_stored
from lora_hub_sdk.registry.records import EncoderRecord, adapter_of, event_of, score_of, vector_of
from lora_hub_sdk.registry.selection import visible
from lora_hub_sdk.registry.tables import (
    AdapterRow,
    EmbeddingRow,
    EventRow,
    MetaRow,
    NamespaceRow,
    PullRow,
    RevisionRow,
    SampleRow,
    ScoreRow,
    TagRow,
)
from lora_hub_sdk.types import Adapter, AdapterFilter, Event, Score

VERSION: Final = "version"
#: The active encoder, once something was registered.
ENCODER: Final = "encoder"
#: What is learned for a namespace and an encoder: from which score on an adapter fits, and how hits are weighed.
RuleKind = Literal["fit-rule", "weights"]
#: Values in one IN (...); databases bound how many variables a statement may have.
_VALUES_PER_QUERY: Final = 500
_T = TypeVar("_T")


class Pull(NamedTuple):
    """A commit that this registry put into a cache; ``folder`` is its snapshot there."""

    folder: str
    repo_id: str
    revision: str


class SqlQueries:
    """Reads the registry's tables. Thread-safe: every call has its own session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def version(self) -> int:
        """A number that every change of adapters, vectors or scores raises by one, whichever process makes it."""
        with Session(self._engine) as session:
            return read_version(session)

    def active_encoder(self) -> EncoderRecord | None:
        """The encoder that this registry is searched with, or None where none was recorded yet."""
        with Session(self._engine) as session:
            return read_encoder(session)

    def rule(self, kind: RuleKind, namespace: str, encoder: str) -> str | None:
        """What was learned for a namespace under an encoder; None where nothing was."""
        with Session(self._engine) as session:
            return session.scalar(select(MetaRow.value).where(MetaRow.key == rule_key(kind, namespace, encoder)))

    def find(self, name: str, namespace: str) -> Adapter | None:
        """The adapter of that name, or None."""
        if not can_be_stored(name):
            return None
        with Session(self._engine) as session:
            found = _load(session, _ADAPTERS.where(AdapterRow.name == name, AdapterRow.namespace == namespace))
            return found[0] if found else None

    def get(self, name: str, namespace: str) -> Adapter:
        """The adapter of that name.

        Raises:
            AdapterNotFoundError: with names that look alike.
        """
        adapter = self.find(name, namespace)
        if adapter is None:
            with Session(self._engine) as session:
                names = list(session.scalars(select(AdapterRow.name).where(AdapterRow.namespace == namespace)))
            raise AdapterNotFoundError(name, namespace=namespace, similar=difflib.get_close_matches(name, names, n=3))
        return adapter

    def adapters(self, namespace: str | None = None, base_model: str | None = None) -> list[Adapter]:
        """Adapters by name, retired ones too."""
        query = _ADAPTERS
        if namespace is not None:
            query = query.where(AdapterRow.namespace == namespace)
        if base_model is not None:
            query = query.where(AdapterRow.base_model == base_model)
        with Session(self._engine) as session:
            # Sorted here, since databases have orders of their own for letters.
            return sorted(_load(session, query), key=lambda adapter: (adapter.namespace, adapter.name))

    def base_models(self, namespace: str | None = None) -> set[str]:
        """The base models that adapters are registered for, in one namespace or in any."""
        query = select(AdapterRow.base_model).distinct()
        if namespace is not None:
            query = query.where(AdapterRow.namespace == namespace)
        with Session(self._engine) as session:
            return set(session.scalars(query))

    def namespaces(self) -> list[str]:
        """Every namespace that something was registered in."""
        with Session(self._engine) as session:
            return list(session.scalars(select(NamespaceRow.name).order_by(NamespaceRow.name)))

    def follows(self, adapter: Adapter) -> str | None:
        """The branch or tag that an adapter was registered from; None for a commit, the main branch or a folder."""
        with Session(self._engine) as session:
            return session.scalar(select(AdapterRow.follows).where(AdapterRow.id == adapter.id))

    def given(self, adapter: Adapter) -> tuple[str | None, tuple[str, ...]]:
        """The description and the tags that were given at registration, the card's left out."""
        tags = select(TagRow.tag).where(TagRow.adapter_id == adapter.id, TagRow.given).order_by(TagRow.position)
        with Session(self._engine) as session:
            description = session.scalar(select(AdapterRow.description).where(AdapterRow.id == adapter.id))
            return description, tuple(session.scalars(tags))

    def samples(self, adapter: Adapter) -> tuple[str, ...]:
        """The texts of an adapter that were kept, in order."""
        query = select(SampleRow.text).where(SampleRow.adapter_id == adapter.id).order_by(SampleRow.position)
        with Session(self._engine) as session:
            return tuple(session.scalars(query))

    def samples_of(self, adapters: Iterable[int], most: int) -> dict[int, tuple[str, ...]]:
        """By id, the first ``most`` texts that were kept of each adapter, in order; who has none is left out."""
        query = select(SampleRow.adapter_id, SampleRow.text).where(SampleRow.position < most)
        texts: dict[int, list[str]] = {}
        with Session(self._engine) as session:
            for part in _parts(adapters):
                of_part = query.where(SampleRow.adapter_id.in_(part)).order_by(SampleRow.adapter_id, SampleRow.position)
                for adapter, text in session.execute(of_part):
                    texts.setdefault(adapter, []).append(text)
        return {adapter: tuple(found) for adapter, found in texts.items()}

    def with_samples(self) -> set[int]:
        """The ids of adapters of which texts were kept."""
        with Session(self._engine) as session:
            return set(session.scalars(select(SampleRow.adapter_id).distinct()))

    # -- what the index holds -----------------------------------------------------------------------------------------

    def keys(self, encoder: str, adapters: Iterable[int] | None = None) -> set[str]:
        """The keys of all vectors that can be searched under an encoder, or of those of some adapters."""
        chosen = select(AdapterRow.id, EmbeddingRow.id).join(EmbeddingRow, EmbeddingRow.adapter_id == AdapterRow.id)
        chosen = chosen.where(EmbeddingRow.encoder == encoder, AdapterRow.state == "active")
        with Session(self._engine) as session:
            if adapters is None:
                parts = [session.execute(chosen).all()]
            else:
                parts = [session.execute(chosen.where(AdapterRow.id.in_(part))).all() for part in _parts(adapters)]
        return {key_of(adapter, embedding) for part in parts for adapter, embedding in part}

    def entries(self, keys: Iterable[str]) -> Iterator[list[Entry]]:
        """The vectors behind keys, some hundred at a time; those that are gone are left out."""
        query = select(
            AdapterRow.id, EmbeddingRow.id, AdapterRow.namespace, AdapterRow.base_model, EmbeddingRow.vector
        ).join(EmbeddingRow, EmbeddingRow.adapter_id == AdapterRow.id)
        for part in _parts(embedding_id_of(key) for key in keys):
            with Session(self._engine) as session:
                rows = session.execute(query.where(EmbeddingRow.id.in_(part))).all()
            yield [
                Entry(adapter, embedding, namespace, base_model, vector_of(vector))
                for adapter, embedding, namespace, base_model, vector in rows
            ]

    def changed_since(self, version: int) -> set[int]:
        """The ids of adapters that changed after a version, removed ones too."""
        with Session(self._engine) as session:
            return set(session.scalars(select(EventRow.adapter_id).where(EventRow.version > version).distinct()))

    def behind(self, keys: Iterable[str], allowed: AdapterFilter) -> dict[str, Adapter]:
        """The adapters behind keys of the index, as they are now.

        Keys that SQL does not know any more are left out, and so are adapters that the filter keeps from its caller:
        the index alone never decides what somebody sees.
        """
        embeddings = {embedding_id_of(key): key for key in keys}
        query = _ADAPTERS.add_columns(EmbeddingRow.id).join(EmbeddingRow, EmbeddingRow.adapter_id == AdapterRow.id)
        query = query.where(*visible(allowed))
        found: dict[str, Adapter] = {}
        with Session(self._engine) as session:
            for part in _parts(embeddings):
                rows = session.execute(query.where(EmbeddingRow.id.in_(part))).all()
                tags = _tags(session, [row.id for row, _, _ in rows])
                found |= {
                    embeddings[number]: adapter_of(row, current, tags.get(row.id, ())) for row, current, number in rows
                }
        return found

    def visible_ids(self, allowed: AdapterFilter) -> frozenset[int]:
        """The ids of all adapters that a filter lets through, ``exclude`` left out."""
        with Session(self._engine) as session:
            return frozenset(session.scalars(select(AdapterRow.id).where(*visible(allowed))))

    def ids_of(self, names: Iterable[str], namespace: str) -> frozenset[int]:
        """The ids of names; names that nobody has are left out."""
        query = select(AdapterRow.id).where(AdapterRow.namespace == namespace)
        with Session(self._engine) as session:
            parts = (session.scalars(query.where(AdapterRow.name.in_(part))) for part in _parts(names))
            return frozenset(number for part in parts for number in part)

    def without_embedding(
        self, encoder: str, adapters: Iterable[int] | None = None, *, retired: bool = False
    ) -> list[Adapter]:
        """Adapters in service (or ``retired`` ones too), or those of some ids, without a vector under this encoder."""
        query = _ADAPTERS.where(lacks(encoder)).order_by(AdapterRow.id)
        if not retired:
            query = query.where(AdapterRow.state == "active")
        with Session(self._engine) as session:
            if adapters is None:
                return _load(session, query)
            parts = (_load(session, query.where(AdapterRow.id.in_(part))) for part in _parts(adapters))
            return [adapter for part in parts for adapter in part]

    def known(self, namespace: str, base_model: str, encoder: str, limit: int) -> list[tuple[Path, Vector]]:
        """The folders and vectors of adapters in service, the latest first, guessed vectors left out."""
        query = (
            select(RevisionRow.folder, EmbeddingRow.vector)
            .join(AdapterRow, (AdapterRow.id == RevisionRow.adapter_id) & RevisionRow.current)
            .join(EmbeddingRow, EmbeddingRow.adapter_id == AdapterRow.id)
            .where(EmbeddingRow.encoder == encoder, AdapterRow.origin != "guess")
            .where(*visible(AdapterFilter(namespace, base_model)))
            .order_by(AdapterRow.id.desc())
            .limit(limit)
        )
        with Session(self._engine) as session:
            return [(Path(folder), vector_of(vector)) for folder, vector in session.execute(query)]

    def vector(self, adapter: Adapter, encoder: str) -> bytes | None:
        """An adapter's vector under an encoder, as it is stored."""
        query = select(EmbeddingRow.vector).where(
            EmbeddingRow.adapter_id == adapter.id, EmbeddingRow.encoder == encoder
        )
        with Session(self._engine) as session:
            return session.scalar(query)

    # -- history ------------------------------------------------------------------------------------------------------

    def scores(self, adapter: Adapter) -> list[Score]:
        """Every score of an adapter, those of its current content first."""
        query = select(ScoreRow).where(ScoreRow.adapter_id == adapter.id).order_by(ScoreRow.task, ScoreRow.metric)
        with Session(self._engine) as session:
            scores = [score_of(row, adapter.digest) for row in session.scalars(query)]
        return sorted(scores, key=lambda score: not score.current)

    def events(self, name: str | None, namespace: str | None, limit: int) -> list[Event]:
        """The latest events, newest first."""
        query = select(EventRow).order_by(EventRow.id.desc()).limit(limit)
        if name is not None:
            query = query.where(EventRow.name == name)
        if namespace is not None:
            query = query.where(EventRow.namespace == namespace)
        with Session(self._engine) as session:
            return [event_of(row) for row in session.scalars(query)]

    def pulls(self) -> list[Pull]:
        """Every commit that this registry put into a cache and did not take from there again."""
        with Session(self._engine) as session:
            rows = session.scalars(select(PullRow).order_by(PullRow.folder))
            return [Pull(row.folder, row.repo_id, row.revision) for row in rows]

    def folders_in_use(self) -> set[str]:
        """The folders of all current revisions, retired adapters' too."""
        with Session(self._engine) as session:
            return set(session.scalars(select(RevisionRow.folder).where(RevisionRow.current)))

    def digests_in_use(self, digests: Iterable[str]) -> set[str]:
        """Those of some contents that an adapter has now, retired ones too."""
        query = select(RevisionRow.digest).where(RevisionRow.current)
        with Session(self._engine) as session:
            parts = (session.scalars(query.where(RevisionRow.digest.in_(part))) for part in _parts(digests))
            return {digest for part in parts for digest in part}


_ADAPTERS: Final = select(AdapterRow, RevisionRow).join(
    RevisionRow, (RevisionRow.adapter_id == AdapterRow.id) & RevisionRow.current
)


def read_version(session: Session) -> int:
    """The registry's version as this session sees it."""
    return int(session.scalars(select(MetaRow.value).where(MetaRow.key == VERSION)).one())


def read_encoder(session: Session) -> EncoderRecord | None:
    """The active encoder as this session sees it."""
    text = session.scalar(select(MetaRow.value).where(MetaRow.key == ENCODER))
    return None if text is None else EncoderRecord.of_text(text)


def rule_key(kind: RuleKind, namespace: str, encoder: str) -> str:
    """Short enough for the column, whatever the namespace."""
    return f"{kind}:{hashlib.sha256(f'{encoder} {namespace}'.encode()).hexdigest()[:48]}"


def lacks(encoder: str) -> ColumnElement[bool]:
    """Whether an adapter has no vector under an encoder."""
    return ~exists().where(EmbeddingRow.adapter_id == AdapterRow.id, EmbeddingRow.encoder == encoder)


def load_adapter(session: Session, adapter_id: int) -> Adapter | None:
    """An adapter as this session sees it."""
    found = _load(session, _ADAPTERS.where(AdapterRow.id == adapter_id))
    return found[0] if found else None


def _load(session: Session, query: Select[AdapterRow, RevisionRow]) -> list[Adapter]:
    rows = session.execute(query).all()
    tags = _tags(session, [row.id for row, _ in rows])
    return [adapter_of(row, current, tags.get(row.id, ())) for row, current in rows]


def _tags(session: Session, adapters: Sequence[int]) -> dict[int, list[str]]:
    tags: dict[int, list[str]] = {}
    for part in _parts(adapters):
        query = select(TagRow.adapter_id, TagRow.tag).where(TagRow.adapter_id.in_(part))
        for adapter, tag in session.execute(query.order_by(TagRow.adapter_id, TagRow.position)):
            tags.setdefault(adapter, []).append(tag)
    return tags


def _parts(values: Iterable[_T]) -> Iterator[list[_T]]:
    everything = list(values)
    for start in range(0, len(everything), _VALUES_PER_QUERY):
        yield everything[start : start + _VALUES_PER_QUERY]
