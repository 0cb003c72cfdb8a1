"""Adapters, their samples, encoders, and the vectors that belong to one encoder each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "meta",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("namespace", sa.String(128), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("repo_id", sa.Text, nullable=False),
        sa.Column("revision", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("base_model", sa.String(512), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("alpha", sa.Double, nullable=False),
        sa.Column("target_modules", sa.JSON, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("license", sa.String(128)),
        sa.Column("description", sa.Text),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("namespace", "name", name="uq_adapters_namespace_name"),
        # An id that was removed is never given to another adapter: the vector index is keyed by it.
        sqlite_autoincrement=True,
    )
    op.create_index("ix_adapters_digest", "adapters", ["digest"])
    op.create_index("ix_adapters_base_model", "adapters", ["base_model"])
    op.create_table(
        "samples",
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "encoders",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
    )
    op.create_table(
        "embeddings",
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("encoder", sa.String(64), sa.ForeignKey("encoders.fingerprint"), primary_key=True),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
    )


def downgrade() -> None:
    for table in ("embeddings", "encoders", "samples", "adapters", "meta"):
        op.drop_table(table)
