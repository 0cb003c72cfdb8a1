"""What goes into the store, and the way between tables' rows and the dataclasses that travel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from lora_hub_sdk.registry.admission import Admitted
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.source import Pulled
from lora_hub_sdk.registry.tables import AdapterRow, EmbeddingRow, EventRow, RevisionRow, SampleRow, ScoreRow, TagRow
from lora_hub_sdk.types import Adapter, AdapterState, Event, Origin, Score


@dataclass(frozen=True, slots=True)
class EncoderRecord:
    """The encoder that a registry is searched with, and how any process comes by it.

    ``reference`` is a Hub id or an absolute folder; None where the encoder was an object that nobody else can load.
    ``instruction`` is what it puts in front of every text.
    """

    fingerprint: str
    name: str
    reference: str | None = None
    instruction: str | None = None

    def as_text(self) -> str:
        """As the database keeps it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> EncoderRecord:
        """From what ``as_text`` made."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, eq=False)
class Representation:
    """What an adapter is found by: one vector under one encoder, and where it comes from.

    ``texts`` are the samples that shall be kept, none of them where their owner keeps them; ``count`` were embedded.
    ``reference`` and ``instruction`` are the encoder's, as in ``EncoderRecord``.
    """

    vector: Vector
    encoder: str
    encoder_name: str
    origin: Origin
    texts: tuple[str, ...] = ()
    count: int = 0
    reference: str | None = None
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Registration:
    """Everything that one registration writes, in one transaction. ``base_model`` in canonical spelling.

    ``description`` and ``tags`` are those given by the caller; the card's are in ``pulled``. ``follows`` is the branch
    or tag to be asked for newer revisions. ``representation`` is None where an update keeps the one before.
    """

    name: str
    namespace: str
    pulled: Pulled
    admitted: Admitted
    base_model: str
    representation: Representation | None
    description: str | None = None
    tags: tuple[str, ...] = ()
    follows: str | None = None

    @property
    def revision(self) -> str:
        """40 hex digits: the commit, or the head of a local folder's digest."""
        return self.pulled.revision or self.admitted.digest[:40]


def adapter_row(registration: Registration, now: datetime) -> AdapterRow:
    """An adapter's identity."""
    return AdapterRow(
        namespace=registration.namespace,
        name=registration.name,
        base_model=registration.base_model,
        state="active",
        pinned=False,
        follows=registration.follows,
        description=registration.description,
        origin="",
        sample_count=0,
        created_at=now,
        updated_at=now,
    )


def revision_row(adapter_id: int, registration: Registration, now: datetime) -> RevisionRow:
    """The current revision of an adapter."""
    admitted, pulled = registration.admitted, registration.pulled
    return RevisionRow(
        adapter_id=adapter_id,
        current=True,
        repo_id=pulled.repo_id,
        revision=registration.revision,
        digest=admitted.digest,
        rank=admitted.max_rank,
        alpha=admitted.config.alpha,
        target_modules=list(admitted.target_modules),
        size_bytes=admitted.size_bytes,
        license=pulled.license,
        description=pulled.description,
        folder=str(pulled.folder),
        created_at=now,
    )


def tag_rows(adapter_id: int, card: Iterable[str], given: Iterable[str]) -> list[TagRow]:
    """The card's tags, then those given; one that is both counts as given, so that no update takes it away."""
    own = set(given := tuple(given))
    tags = dict.fromkeys((*card, *given))
    return [TagRow(adapter_id=adapter_id, tag=tag, position=place, given=tag in own) for place, tag in enumerate(tags)]


def sample_rows(adapter_id: int, texts: Sequence[str]) -> list[SampleRow]:
    """The texts in their order."""
    return [SampleRow(adapter_id=adapter_id, position=place, text=text) for place, text in enumerate(texts)]


def embedding_row(adapter_id: int, encoder: str, vector: Vector) -> EmbeddingRow:
    """A vector as bytes."""
    return EmbeddingRow(adapter_id=adapter_id, encoder=encoder, vector=np.asarray(vector, dtype="<f4").tobytes())


def vector_of(content: bytes) -> Vector:
    """The vector behind the bytes."""
    return np.frombuffer(content, dtype="<f4")


def adapter_of(row: AdapterRow, current: RevisionRow, tags: Sequence[str]) -> Adapter:
    """What travels, from the rows of one adapter."""
    return Adapter(
        id=row.id,
        name=row.name,
        namespace=row.namespace,
        repo_id=current.repo_id,
        revision=current.revision,
        digest=current.digest,
        base_model=row.base_model,
        rank=current.rank,
        alpha=current.alpha,
        target_modules=tuple(current.target_modules),
        size_bytes=current.size_bytes,
        license=current.license,
        description=row.description or current.description,
        tags=tuple(tags),
        folder=Path(current.folder),
        sample_count=row.sample_count,
        created_at=utc(row.created_at),
        updated_at=utc(row.updated_at),
        state=cast(AdapterState, row.state),
        pinned=row.pinned,
        origin=cast(Origin, row.origin),
    )


def score_of(row: ScoreRow, digest: str) -> Score:
    """A score, beside the digest that its adapter has now."""
    return Score(row.task, row.metric, row.value, row.revision, utc(row.recorded_at), row.digest == digest)


def event_of(row: EventRow) -> Event:
    """An event."""
    detail: dict[str, Any] = dict(row.detail)
    return Event(row.id, utc(row.at), row.actor, row.action, row.namespace, row.name, detail)


def utc(time: datetime) -> datetime:
    """SQLite forgets the zone; what was written was UTC."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
