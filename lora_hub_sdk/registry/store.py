"""The SQL side of the registry: what is written here is the truth."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, Integer, Text, cast, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lora_hub_sdk.errors import AdapterNotFoundError, ConflictError, EncoderMismatchError, NameTakenError, PinnedError
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.queries import (
    ENCODER,
    VERSION,
    RuleKind,
    SqlQueries,
    lacks,
    load_adapter,
    read_encoder,
    read_version,
    rule_key,
)
from lora_hub_sdk.registry.records import (
    EncoderRecord,
    Registration,
    Representation,
    adapter_row,
    embedding_row,
    revision_row,
    sample_rows,
    tag_rows,
    vector_of,
)
from lora_hub_sdk.registry.tables import (
    AdapterRow,
    EmbeddingRow,
    EncoderRow,
    EventRow,
    MetaRow,
    NamespaceRow,
    PullRow,
    RevisionRow,
    SampleRow,
    ScoreRow,
    TagRow,
)
from lora_hub_sdk.types import Adapter, AdapterState

_REGISTRY_ID: Final = "registry_id"


@dataclass(frozen=True, slots=True)
class _Change:
    """One transaction that writes. It holds the registry's write lock, so what it reads stays true until it commits."""

    session: Session
    version: int
    actor: str
    now: datetime

    def note(self, action: str, row: AdapterRow, **detail: str | int | float | None) -> None:
        """Leave an event, by which people and vector indexes learn of the change."""
        self._note(action, row.id, row.namespace, row.name, detail)

    def note_registry(self, action: str, namespace: str, name: str, **detail: str | int | float | None) -> None:
        """Leave an event that is of no adapter, and yet part of the history: every version has its event."""
        self._note(action, 0, namespace, name, detail)

    def _note(
        self, action: str, adapter_id: int, namespace: str, name: str, detail: dict[str, str | int | float | None]
    ) -> None:
        event = EventRow(
            version=self.version,
            at=self.now,
            actor=self.actor,
            action=action,
            adapter_id=adapter_id,
            namespace=namespace,
            name=name,
            detail=detail,
        )
        self.session.add(event)

    def row(self, adapter: Adapter) -> AdapterRow:
        """The row of an adapter that somebody read earlier.

        Raises:
            AdapterNotFoundError: it was removed meanwhile.
        """
        row = self.session.get(AdapterRow, adapter.id)
        if row is None:
            raise AdapterNotFoundError(adapter.name, namespace=adapter.namespace)
        return row

    def unmoved(self, known: Adapter) -> AdapterRow:
        """The row of an adapter that somebody read earlier, if it still has that content.

        Raises:
            ConflictError: it has another revision by now.
            AdapterNotFoundError: it was removed meanwhile.
        """
        row = self.row(known)
        now = self.adapter(row)
        if (now.revision, now.digest) != (known.revision, known.digest):
            raise ConflictError(
                f"{known.name!r} was at revision {known.revision[:12]}, is at {now.revision[:12]} by now; nothing was "
                "written, update it again"
            )
        return row

    def adapter(self, row: AdapterRow) -> Adapter:
        """What was written, as it travels."""
        self.session.flush()
        adapter = load_adapter(self.session, row.id)
        assert adapter is not None
        return adapter


class SqlStore(SqlQueries):
    """Adapters, revisions, samples, encoders, vectors, scores and events in SQL. Thread-safe.

    Writers take turns, across threads and processes: the first statement of each of their transactions raises the
    version, whose row one transaction at a time can hold.

    Args:
        actor: who is written into the events.
    """

    def __init__(self, engine: Engine, actor: str) -> None:
        super().__init__(engine)
        self._actor = actor
        # Threads wait here rather than in SQLite, which lets those that wait sleep ever longer.
        self._turn = threading.Lock()
        self.registry_id = self._ensure_id()

    def add(self, registration: Registration) -> Adapter:
        """Write a registration, all of it or nothing.

        Raises:
            NameTakenError: the name is there already, whoever wrote it.
            EncoderMismatchError: its vector is not of the active encoder.
        """
        with self._change() as change:
            session, namespace = change.session, registration.namespace
            taken = select(AdapterRow.id).where(AdapterRow.name == registration.name, AdapterRow.namespace == namespace)
            if session.scalar(taken) is not None:
                raise NameTakenError(f"the name {registration.name!r} is taken in namespace {namespace!r}")
            if session.get(NamespaceRow, namespace) is None:
                session.add(NamespaceRow(name=namespace, created_at=change.now))
                session.flush()
            row = adapter_row(registration, change.now)
            session.add(row)
            session.flush()
            session.add(revision_row(row.id, registration, change.now))
            session.add_all(tag_rows(row.id, registration.pulled.tags, registration.tags))
            if registration.representation is not None:
                _represent(session, row, registration.representation)
            change.note("registered", row, revision=registration.revision, origin=row.origin)
            return change.adapter(row)

    def replace(self, known: Adapter, registration: Registration) -> Adapter:
        """Move an adapter to another revision; the one before stays as history.

        Args:
            known: the adapter as it was when the new revision was decided on.
            registration: without a representation, samples and vectors stay as they are.

        Raises:
            ConflictError: the adapter has another revision by now.
            PinnedError: it was pinned meanwhile.
            AdapterNotFoundError: it was removed meanwhile.
            EncoderMismatchError: the new vector is not of the active encoder.
        """
        with self._change() as change:
            session, row = change.session, change.unmoved(known)
            if row.pinned:
                raise PinnedError(
                    f"{known.name!r} was pinned to revision {known.revision[:12]} meanwhile; hub.unpin({known.name!r}) "
                    "lets it move"
                )
            session.execute(update(RevisionRow).where(RevisionRow.adapter_id == row.id).values(current=False))
            session.execute(delete(TagRow).where(TagRow.adapter_id == row.id))
            session.add(revision_row(row.id, registration, change.now))
            session.add_all(tag_rows(row.id, registration.pulled.tags, registration.tags))
            row.follows, row.description, row.updated_at = registration.follows, registration.description, change.now
            if registration.representation is not None:
                for table in (SampleRow, EmbeddingRow):
                    session.execute(delete(table).where(table.adapter_id == row.id))
                _represent(session, row, registration.representation)
            change.note("updated", row, before=known.revision, revision=registration.revision)
            return change.adapter(row)

    def set_state(self, adapter: Adapter, state: AdapterState) -> Adapter:
        """Take an adapter out of service, or back into it."""
        with self._change() as change:
            row = change.row(adapter)
            row.state, row.updated_at = state, change.now
            if state == "active":
                # Under new keys: a slow process may be about to take the old ones from an index that all share.
                for old in change.session.scalars(select(EmbeddingRow).where(EmbeddingRow.adapter_id == row.id)).all():
                    change.session.delete(old)
                    change.session.flush()
                    change.session.add(embedding_row(row.id, old.encoder, vector_of(old.vector)))
            now = change.adapter(row)
            change.note("retired" if state == "retired" else "restored", row, revision=now.revision)
            return now

    def set_pinned(self, adapter: Adapter, pinned: bool) -> Adapter:
        """Hold an adapter at its revision, or let it move."""
        with self._change() as change:
            row = change.row(adapter)
            row.pinned, row.updated_at = pinned, change.now
            now = change.adapter(row)
            change.note("pinned" if pinned else "unpinned", row, revision=now.revision)
            return now

    def record_score(self, adapter: Adapter, task: str, metric: str, value: float) -> None:
        """Keep a score of the content that the caller measured; an earlier one is replaced."""
        with self._change() as change:
            row = change.row(adapter)
            score = ScoreRow(
                adapter_id=row.id,
                digest=adapter.digest,
                task=task,
                metric=metric,
                revision=adapter.revision,
                value=value,
                recorded_at=change.now,
            )
            change.session.merge(score)
            change.note("scored", row, task=task, metric=metric, value=value)

    def move(self, adapter: Adapter, folder: Path) -> Adapter:
        """Note another place of the same files.

        Raises:
            ConflictError: the adapter has another revision by now.
            AdapterNotFoundError: it was removed meanwhile.
        """
        with self._change() as change:
            row = change.unmoved(adapter)
            current = update(RevisionRow).where(RevisionRow.adapter_id == row.id, RevisionRow.current)
            change.session.execute(current.values(folder=str(folder)))
            change.note("moved", row, folder=str(folder))
            return change.adapter(row)

    def remove(self, adapter: Adapter) -> None:
        """Delete an adapter with all that belongs to it; its events stay.

        Raises:
            AdapterNotFoundError: somebody else was first.
        """
        with self._change() as change:
            row = change.row(adapter)
            change.note("removed", row, revision=change.adapter(row).revision)
            change.session.delete(row)

    def add_embedding(
        self,
        adapter: Adapter,
        encoder: str,
        encoder_name: str,
        vector: Vector,
        texts: tuple[str, ...] | None = None,
    ) -> None:
        """Keep the vector of an adapter under another encoder.

        Args:
            texts: the samples that the vector was made from, () for none; they must still be the adapter's.

        Raises:
            ConflictError: the adapter has other content or other samples by now.
            AdapterNotFoundError: it was removed meanwhile.
        """
        with self._change() as change:
            session, row = change.session, change.row(adapter)
            if texts is not None:
                _require_made_from(change, adapter, texts)
            _ensure_encoder(session, encoder, encoder_name, vector)
            same = (EmbeddingRow.adapter_id == row.id) & (EmbeddingRow.encoder == encoder)
            session.execute(delete(EmbeddingRow).where(same))
            session.add(embedding_row(row.id, encoder, vector))
            change.note("embedded", row, encoder=encoder)

    def activate(self, record: EncoderRecord) -> None:
        """Make an encoder the one that this registry is searched with, if every adapter has a vector of it.

        Raises:
            ConflictError: some adapter, in service or not, has none; nothing was written.
        """
        with self._change() as change:
            session, old = change.session, read_encoder(change.session)
            waiting = list(session.scalars(select(AdapterRow.name).where(lacks(record.fingerprint)).limit(3)))
            if waiting:
                raise ConflictError(
                    f"{', '.join(map(repr, waiting))} have no vector under encoder {record.name!r}; embed them, then "
                    "switch again"
                )
            session.merge(MetaRow(key=ENCODER, value=record.as_text()))
            before = None if old is None else old.fingerprint
            change.note_registry("switched", "", record.name, before=before, encoder=record.fingerprint)

    def keep_rule(self, kind: RuleKind, namespace: str, encoder: str, rule: str) -> None:
        """Keep what was learned for a namespace under an encoder, in place of an earlier rule of its kind."""
        with self._change() as change:
            change.session.merge(MetaRow(key=rule_key(kind, namespace, encoder), value=rule))
            change.note_registry("calibrated" if kind == "fit-rule" else "weighed", namespace, "", encoder=encoder)

    def note_pull(self, folder: Path, repo_id: str, revision: str) -> None:
        """Note that a commit is about to be put into a cache."""
        pull = PullRow(folder=str(folder), repo_id=repo_id, revision=revision, started_at=datetime.now(UTC))
        with self._turn, Session(self._engine) as session, session.begin():
            # Written first, since SQLite refuses to turn a reader into a writer while others write.
            session.execute(delete(PullRow).where(PullRow.folder == pull.folder))
            session.add(pull)

    def forget_pull(self, folder: str) -> None:
        """Note that a commit was taken out of its cache."""
        with self._turn, Session(self._engine) as session, session.begin():
            session.execute(delete(PullRow).where(PullRow.folder == folder))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextmanager
    def _change(self) -> Iterator[_Change]:
        with self._turn, Session(self._engine, expire_on_commit=False) as session, session.begin():
            # First of all: the update takes the write lock before anything is read.
            raised = cast(cast(MetaRow.value, Integer) + 1, Text)
            session.execute(update(MetaRow).where(MetaRow.key == VERSION).values(value=raised))
            yield _Change(session, read_version(session), self._actor, datetime.now(UTC))

    def _ensure_id(self) -> str:
        known = select(MetaRow.value).where(MetaRow.key == _REGISTRY_ID)
        with Session(self._engine) as session:
            found = session.scalar(known)
        if found is not None:
            return found
        try:
            with Session(self._engine) as session, session.begin():
                rows = {_REGISTRY_ID: uuid.uuid4().hex, VERSION: "0"}
                session.add_all(MetaRow(key=key, value=value) for key, value in rows.items())
        except IntegrityError:  # another process was first
            pass
        return self._ensure_id()


def _represent(session: Session, row: AdapterRow, representation: Representation) -> None:
    encoder, name = representation.encoder, representation.encoder_name
    active = read_encoder(session)
    if active is not None and active.fingerprint != encoder:
        raise EncoderMismatchError(
            f"{row.name!r} brings a vector of encoder {name!r} ({encoder[:12]}), this registry is searched with "
            f"{active.name!r} ({active.fingerprint[:12]}); nothing was written: make it with that one, which a hub "
            "opened without encoder=... has, or switch the registry to the other by hub.switch_encoder(...)"
        )
    row.origin, row.sample_count = representation.origin, representation.count
    _ensure_encoder(session, encoder, name, representation.vector)
    session.add_all(sample_rows(row.id, representation.texts))
    session.add(embedding_row(row.id, encoder, representation.vector))
    # A registry of an earlier version records none, and its other vectors may be of another encoder.
    if active is None and session.scalar(select(AdapterRow.id).where(lacks(encoder)).limit(1)) is None:
        record = EncoderRecord(encoder, name, representation.reference, representation.instruction)
        session.add(MetaRow(key=ENCODER, value=record.as_text()))


def _require_made_from(change: _Change, adapter: Adapter, texts: tuple[str, ...]) -> None:
    """Refuse a vector that was made from what the adapter has no more."""
    row = change.row(adapter) if texts else change.unmoved(adapter)  # a guess is made from the files
    kept = select(SampleRow.text).where(SampleRow.adapter_id == row.id).order_by(SampleRow.position)
    if row.origin != adapter.origin or tuple(change.session.scalars(kept)) != texts:
        raise ConflictError(f"{adapter.name!r} has other samples by now; nothing was written, embed it again")


def _ensure_encoder(session: Session, fingerprint: str, name: str, vector: Vector) -> None:
    if session.get(EncoderRow, fingerprint) is None:
        session.add(EncoderRow(fingerprint=fingerprint, name=name, dimension=len(vector)))
        session.flush()
