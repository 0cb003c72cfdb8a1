"""The SQL tables. SQL is the truth; the vector index is a cache of ``embeddings``."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """Root of the tables."""


class MetaRow(Base):
    """Facts about this registry as a whole; ``registry_id`` tells two registries apart in one vector index."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class AdapterRow(Base):
    """One adapter at one content; a name is unique within its namespace."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("namespace", "name", name="uq_adapters_namespace_name"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    namespace: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(512))
    repo_id: Mapped[str] = mapped_column(Text)
    revision: Mapped[str] = mapped_column(String(40))
    digest: Mapped[str] = mapped_column(String(64), index=True)
    base_model: Mapped[str] = mapped_column(String(512), index=True)
    rank: Mapped[int] = mapped_column(Integer)
    alpha: Mapped[float] = mapped_column(Double)
    target_modules: Mapped[list[str]] = mapped_column(JSON)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    license: Mapped[str | None] = mapped_column(String(128))
    description: Mapped[str | None] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(JSON)
    folder: Mapped[str] = mapped_column(Text)
    sample_count: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))

    samples: Mapped[list[SampleRow]] = relationship(cascade="all, delete-orphan")
    embeddings: Mapped[list[EmbeddingRow]] = relationship(cascade="all, delete-orphan")


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

    ``origin`` tells whether we embedded the samples, or the owner gave the vector and kept the samples.
    """

    __tablename__ = "embeddings"
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    encoder: Mapped[str] = mapped_column(ForeignKey("encoders.fingerprint"), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    origin: Mapped[str] = mapped_column(String(16))
