"""The SQL side of the registry: what is written here is the truth."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, Integer, Select, Text, cast, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lora_hub_sdk.errors import AdapterNotFoundError, NameTakenError
from lora_hub_sdk.registry.admission import Admitted
from lora_hub_sdk.registry.source import Pulled
from lora_hub_sdk.registry.tables import AdapterRow, EmbeddingRow, EncoderRow, MetaRow, SampleRow
from lora_hub_sdk.types import Adapter

Vector = NDArray[np.float32]
_REGISTRY_ID: Final = "registry_id"
_VERSION: Final = "version"


@dataclass(frozen=True, slots=True)
class Registration:
    """Everything that one registration writes, in one transaction. ``base_model`` in canonical spelling."""

    name: str
    namespace: str
    pulled: Pulled
    admitted: Admitted
    base_model: str
    description: str | None
    tags: tuple[str, ...]
    samples: tuple[str, ...]
    vector: Vector
    origin: Literal["samples", "owner"]
    encoder: str
    encoder_name: str


@dataclass(frozen=True, slots=True)
class Embedding:
    """One adapter's vector, with what the vector index filters by."""

    adapter_id: int
    namespace: str
    base_model: str
    vector: Vector


class SqlStore:
    """Adapters, samples, encoders and vectors in SQL. Thread-safe: every call has its own session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.registry_id = self._ensure_id()

    def version(self) -> int:
        """A number that every change of adapters or vectors raises by one, whichever process makes it."""
        with Session(self._engine) as session:
            return _version(session)

    def add(self, registration: Registration) -> tuple[Adapter, int]:
        """Write a registration, all of it or nothing; returns the adapter and the version that it made.

        Raises:
            NameTakenError: another process took the name in between.
        """
        row = _new_row(registration)
        try:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                version = _raise_version(session)
                _ensure_encoder(session, registration.encoder, registration.encoder_name, registration.vector)
                session.add(row)
        except IntegrityError as error:
            raise NameTakenError(
                f"the name {registration.name!r} was taken in namespace {registration.namespace!r} meanwhile"
            ) from error
        return _adapter(row), version

    def find(self, name: str, namespace: str) -> Adapter | None:
        """The adapter of that name, or None."""
        with Session(self._engine) as session:
            row = session.scalars(_named(name, namespace)).one_or_none()
            return None if row is None else _adapter(row)

    def get(self, name: str, namespace: str) -> Adapter:
        """The adapter of that name.

        Raises:
            AdapterNotFoundError: with names that look alike.
        """
        adapter = self.find(name, namespace)
        if adapter is None:
            names = [other.name for other in self.adapters(namespace)]
            raise AdapterNotFoundError(name, namespace=namespace, similar=difflib.get_close_matches(name, names, n=3))
        return adapter

    def adapters(self, namespace: str | None = None, base_model: str | None = None) -> list[Adapter]:
        """Adapters by name."""
        query = select(AdapterRow).order_by(AdapterRow.namespace, AdapterRow.name)
        if namespace is not None:
            query = query.where(AdapterRow.namespace == namespace)
        if base_model is not None:
            query = query.where(AdapterRow.base_model == base_model)
        with Session(self._engine) as session:
            return [_adapter(row) for row in session.scalars(query)]

    def base_models(self) -> set[str]:
        """The base models that adapters are registered for."""
        with Session(self._engine) as session:
            return set(session.scalars(select(AdapterRow.base_model).distinct()))

    def by_ids(self, ids: Iterable[int]) -> dict[int, Adapter]:
        """Adapters by id; ids that are gone are left out."""
        with Session(self._engine) as session:
            rows = session.scalars(select(AdapterRow).where(AdapterRow.id.in_(set(ids))))
            return {row.id: _adapter(row) for row in rows}

    def samples(self, adapter: Adapter) -> tuple[str, ...]:
        """The texts that an adapter was registered with."""
        query = select(SampleRow.text).where(SampleRow.adapter_id == adapter.id).order_by(SampleRow.position)
        with Session(self._engine) as session:
            return tuple(session.scalars(query))

    def move(self, adapter: Adapter, folder: Path) -> Adapter:
        """Note another place of the same files."""
        with Session(self._engine) as session, session.begin():
            session.execute(update(AdapterRow).where(AdapterRow.id == adapter.id).values(folder=str(folder)))
        return replace(adapter, folder=folder)

    def remove(self, adapter: Adapter) -> int:
        """Delete an adapter with its samples and vectors, if it is still there; returns the version that this made."""
        with Session(self._engine) as session, session.begin():
            version = _raise_version(session)
            row = session.get(AdapterRow, adapter.id)
            if row is not None:
                session.delete(row)
            return version

    def embeddings(self, encoder: str, adapter: Adapter | None = None) -> list[Embedding]:
        """Every vector under one encoder, or only that of one adapter."""
        query = (
            select(AdapterRow.id, AdapterRow.namespace, AdapterRow.base_model, EmbeddingRow.vector)
            .join(EmbeddingRow, EmbeddingRow.adapter_id == AdapterRow.id)
            .where(EmbeddingRow.encoder == encoder)
            .order_by(AdapterRow.id)
        )
        if adapter is not None:
            query = query.where(AdapterRow.id == adapter.id)
        with Session(self._engine) as session:
            return [
                Embedding(adapter_id, namespace, base, np.frombuffer(vector, dtype="<f4"))
                for adapter_id, namespace, base, vector in session.execute(query)
            ]

    def without_embedding(self, encoder: str) -> list[Adapter]:
        """Adapters that have no vector under this encoder."""
        has_one = select(EmbeddingRow.adapter_id).where(EmbeddingRow.encoder == encoder)
        query = select(AdapterRow).where(AdapterRow.id.not_in(has_one)).order_by(AdapterRow.id)
        with Session(self._engine) as session:
            return [_adapter(row) for row in session.scalars(query)]

    def add_embedding(self, adapter: Adapter, encoder: str, encoder_name: str, vector: Vector) -> None:
        """Keep the vector of an adapter under another encoder."""
        with Session(self._engine) as session, session.begin():
            _raise_version(session)
            _ensure_encoder(session, encoder, encoder_name, vector)
            session.merge(EmbeddingRow(adapter_id=adapter.id, encoder=encoder, vector=_bytes(vector), origin="samples"))

    def close(self) -> None:
        self._engine.dispose()

    def _ensure_id(self) -> str:
        try:
            with Session(self._engine) as session, session.begin():
                row = session.get(MetaRow, _REGISTRY_ID)
                if row is None:
                    row = MetaRow(key=_REGISTRY_ID, value=uuid.uuid4().hex)
                    session.add_all([row, MetaRow(key=_VERSION, value="0")])
                return row.value
        except IntegrityError:  # another process was first
            return self._ensure_id()


def _version(session: Session) -> int:
    return int(session.scalars(select(MetaRow.value).where(MetaRow.key == _VERSION)).one())


def _raise_version(session: Session) -> int:
    """First in every transaction that writes: the update takes SQLite's write lock before anything is read."""
    raised = cast(cast(MetaRow.value, Integer) + 1, Text)
    session.execute(update(MetaRow).where(MetaRow.key == _VERSION).values(value=raised))
    return _version(session)


def _ensure_encoder(session: Session, fingerprint: str, name: str, vector: Vector) -> None:
    if session.get(EncoderRow, fingerprint) is None:
        session.add(EncoderRow(fingerprint=fingerprint, name=name, dimension=len(vector)))
        session.flush()


def _new_row(registration: Registration) -> AdapterRow:
    admitted, pulled = registration.admitted, registration.pulled
    return AdapterRow(
        namespace=registration.namespace,
        name=registration.name,
        repo_id=pulled.repo_id,
        revision=pulled.revision or admitted.digest[:40],
        digest=admitted.digest,
        base_model=registration.base_model,
        rank=admitted.max_rank,
        alpha=admitted.config.alpha,
        target_modules=list(admitted.target_modules),
        size_bytes=admitted.size_bytes,
        license=pulled.license,
        description=registration.description,
        tags=list(registration.tags),
        folder=str(pulled.folder),
        sample_count=len(registration.samples),
        created_at=datetime.now(UTC),
        samples=[SampleRow(position=place, text=text) for place, text in enumerate(registration.samples)],
        embeddings=[
            EmbeddingRow(encoder=registration.encoder, vector=_bytes(registration.vector), origin=registration.origin)
        ],
    )


def _adapter(row: AdapterRow) -> Adapter:
    # SQLite forgets the zone; what was written was UTC.
    created = row.created_at if row.created_at.tzinfo else row.created_at.replace(tzinfo=UTC)
    return Adapter(
        id=row.id,
        name=row.name,
        namespace=row.namespace,
        repo_id=row.repo_id,
        revision=row.revision,
        digest=row.digest,
        base_model=row.base_model,
        rank=row.rank,
        alpha=row.alpha,
        target_modules=tuple(row.target_modules),
        size_bytes=row.size_bytes,
        license=row.license,
        description=row.description,
        tags=tuple(row.tags),
        folder=Path(row.folder),
        sample_count=row.sample_count,
        created_at=created,
    )


def _named(name: str, namespace: str) -> Select[AdapterRow]:
    return select(AdapterRow).where(AdapterRow.name == name, AdapterRow.namespace == namespace)


def _bytes(vector: Sequence[float] | Vector | Any) -> bytes:
    return np.asarray(vector, dtype="<f4").tobytes()
