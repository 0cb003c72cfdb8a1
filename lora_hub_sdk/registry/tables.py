"""The SQL tables. SQL is the truth; the vector index is a cache of ``embeddings``.

An adapter's row is its identity and never moves; what it consists of is its current revision. Everything that changes
an adapter raises the registry's version and leaves an event with that version, so that the events are history for
people and the feed by which a vector index follows.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_UTC = DateTime(timezone=True)


class Base(DeclarativeBase):
    """Root of the tables."""


class MetaRow(Base):
    """Facts about this registry as a whole.

    ``registry_id`` tells two registries apart in one vector index, ``version`` counts changes, ``encoder`` is the one
    that is searched with.
    """

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class NamespaceRow(Base):
    """Whose adapters they are; made by the first registration in it."""

    __tablename__ = "namespaces"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(_UTC)


class AdapterRow(Base):
    """An adapter's identity; a name is unique within its namespace.

    ``description`` is the one given in place of the card's; ``follows`` the branch or tag that ``update`` asks for.
    """

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("namespace", "name", name="uq_adapters_namespace_name"),
        # An id that was removed is never given to another adapter: the vector index is keyed by it.
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    namespace: Mapped[str] = mapped_column(ForeignKey("namespaces.name"))
    name: Mapped[str] = mapped_column(String(512))
    base_model: Mapped[str] = mapped_column(String(512), index=True)
    state: Mapped[str] = mapped_column(String(16))
    pinned: Mapped[bool] = mapped_column(Boolean)
    follows: Mapped[str | None] = mapped_column(Text)
    description: Mapped[str | None] = mapped_column(Text)
    origin: Mapped[str] = mapped_column(String(16))
    sample_count: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(_UTC)
    updated_at: Mapped[datetime] = mapped_column(_UTC)


class RevisionRow(Base):
    """One content that an adapter has, or had. Exactly one of an adapter's revisions is ``current``."""

    __tablename__ = "revisions"
    __table_args__ = (
        Index(
            "uq_revisions_current",
            "adapter_id",
            unique=True,
            sqlite_where=text("current"),
            postgresql_where=text("current"),
        ),
        Index("ix_revisions_adapter_id", "adapter_id"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    current: Mapped[bool] = mapped_column(Boolean)
    repo_id: Mapped[str] = mapped_column(Text)
    revision: Mapped[str] = mapped_column(String(40))
    digest: Mapped[str] = mapped_column(String(64))
    rank: Mapped[int] = mapped_column(Integer)
    alpha: Mapped[float] = mapped_column(Double)
    target_modules: Mapped[list[str]] = mapped_column(JSON)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    license: Mapped[str | None] = mapped_column(Text)
    description: Mapped[str | None] = mapped_column(Text)
    folder: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(_UTC)


class TagRow(Base):
    """One tag of an adapter: ``given`` at registration, or read from the card of its current revision."""

    __tablename__ = "tags"
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(Text, primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    given: Mapped[bool] = mapped_column(Boolean)


class SampleRow(Base):
    """One text that represents an adapter."""

    __tablename__ = "samples"
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text)


class EncoderRow(Base):
    """One encoder by its fingerprint: weights, instruction and pooling together."""

    __tablename__ = "encoders"
    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    dimension: Mapped[int] = mapped_column(Integer)


class EmbeddingRow(Base):
    """One adapter's vector under one encoder: float32, little endian, of length 1.

    Another vector is another row with another id, which is never used again.
    """

    __tablename__ = "embeddings"
    __table_args__ = (
        UniqueConstraint("adapter_id", "encoder", name="uq_embeddings_adapter_encoder"),
        Index("ix_embeddings_encoder", "encoder"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    encoder: Mapped[str] = mapped_column(ForeignKey("encoders.fingerprint"))
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class ScoreRow(Base):
    """A measured score of one content of an adapter; measured again, it is replaced."""

    __tablename__ = "scores"
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    task: Mapped[str] = mapped_column(String(512), primary_key=True)
    metric: Mapped[str] = mapped_column(String(128), primary_key=True)
    revision: Mapped[str] = mapped_column(String(40))
    value: Mapped[float] = mapped_column(Double)
    recorded_at: Mapped[datetime] = mapped_column(_UTC)


class EventRow(Base):
    """Who did what to which adapter; stays when the adapter is gone. ``version`` is the registry's after it."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_version", "version"), Index("ix_events_adapter_id", "adapter_id"))

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    version: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[datetime] = mapped_column(_UTC)
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(String(32))
    adapter_id: Mapped[int] = mapped_column(Integer)
    namespace: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(512))
    detail: Mapped[dict[str, str | int | float | None]] = mapped_column(JSON)


class PullRow(Base):
    """A commit that this registry put into a cache on some machine, and may therefore remove from there."""

    __tablename__ = "pulls"
    folder: Mapped[str] = mapped_column(Text, primary_key=True)
    repo_id: Mapped[str] = mapped_column(Text)
    revision: Mapped[str] = mapped_column(String(40))
    started_at: Mapped[datetime] = mapped_column(_UTC)


class ApiKeyRow(Base):
    """Who may ask the server, for which namespace, and for what. ``digest`` is the secret's sha256.

    A key may be made before its namespace has an adapter. A row stays when its key is revoked, so that a name in a log
    always tells of the same key.
    """

    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("name", name="uq_api_keys_name"),
        UniqueConstraint("digest", name="uq_api_keys_digest"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(128))
    namespace: Mapped[str] = mapped_column(String(128))
    rights: Mapped[list[str]] = mapped_column(JSON)
    prefix: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(_UTC)
    expires_at: Mapped[datetime | None] = mapped_column(_UTC)
    revoked_at: Mapped[datetime | None] = mapped_column(_UTC)
