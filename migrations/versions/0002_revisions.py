"""Revisions, namespaces, tags, scores, events and pulls; a vector gets an id of its own.

The rows are read, the old tables dropped, and the new ones filled: SQLite cannot alter columns, and both databases do
this in one transaction, so that a crash leaves the old tables.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_OLD = ("embeddings", "samples", "adapters")
_SERIAL = ("adapters", "revisions", "embeddings", "events")


def upgrade() -> None:
    old = {name: _rows(name) for name in (*_OLD, "meta")}
    for name in _OLD:
        op.drop_table(name)
    _create()
    _fill(old)
    if op.get_bind().dialect.name == "postgresql":
        # Ids were given by hand, which sequences do not notice.
        for name in _SERIAL:
            op.execute(f"select setval(pg_get_serial_sequence('{name}', 'id'), (select max(id) from {name}))")


def downgrade() -> None:
    raise NotImplementedError("older versions cannot hold revisions, scores and events; restore a copy of the database")


def _rows(name: str) -> list[dict[str, Any]]:
    table = sa.Table(name, sa.MetaData(), autoload_with=op.get_bind())
    return [dict(row) for row in op.get_bind().execute(sa.select(table)).mappings()]


def _adapter_key(**options: Any) -> sa.Column[int]:
    return sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id", ondelete="CASCADE"), **options)


def _create() -> None:
    utc = sa.DateTime(timezone=True)
    op.create_table(
        "namespaces",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("created_at", utc, nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("namespace", sa.String(128), sa.ForeignKey("namespaces.name"), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("base_model", sa.String(512), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("follows", sa.Text),
        sa.Column("description", sa.Text),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.Column("created_at", utc, nullable=False),
        sa.Column("updated_at", utc, nullable=False),
        sa.UniqueConstraint("namespace", "name", name="uq_adapters_namespace_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_adapters_base_model", "adapters", ["base_model"])
    op.create_table(
        "revisions",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _adapter_key(nullable=False),
        sa.Column("current", sa.Boolean, nullable=False),
        sa.Column("repo_id", sa.Text, nullable=False),
        sa.Column("revision", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("alpha", sa.Double, nullable=False),
        sa.Column("target_modules", sa.JSON, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("license", sa.Text),
        sa.Column("description", sa.Text),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("created_at", utc, nullable=False),
    )
    op.create_index(
        "uq_revisions_current",
        "revisions",
        ["adapter_id"],
        unique=True,
        sqlite_where=sa.text("current"),
        postgresql_where=sa.text("current"),
    )
    op.create_index("ix_revisions_adapter_id", "revisions", ["adapter_id"])
    op.create_table(
        "tags",
        _adapter_key(primary_key=True),
        sa.Column("tag", sa.Text, primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("given", sa.Boolean, nullable=False),
    )
    op.create_table(
        "samples",
        _adapter_key(primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "embeddings",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _adapter_key(nullable=False),
        sa.Column("encoder", sa.String(64), sa.ForeignKey("encoders.fingerprint"), nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("adapter_id", "encoder", name="uq_embeddings_adapter_encoder"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_embeddings_encoder", "embeddings", ["encoder"])
    op.create_table(
        "scores",
        _adapter_key(primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("task", sa.String(512), primary_key=True),
        sa.Column("metric", sa.String(128), primary_key=True),
        sa.Column("revision", sa.String(40), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("recorded_at", utc, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("at", utc, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("adapter_id", sa.Integer, nullable=False),
        sa.Column("namespace", sa.String(128), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("ix_events_version", "events", ["version"])
    op.create_index("ix_events_adapter_id", "events", ["adapter_id"])
    op.create_table(
        "pulls",
        sa.Column("folder", sa.Text, primary_key=True),
        sa.Column("repo_id", sa.Text, nullable=False),
        sa.Column("revision", sa.String(40), nullable=False),
        sa.Column("started_at", utc, nullable=False),
    )


def _fill(old: dict[str, list[dict[str, Any]]]) -> None:
    now = datetime.now(UTC)
    version = next((int(row["value"]) for row in old["meta"] if row["key"] == "version"), 0)
    # Only now can it be told whether samples or the owner made a vector; the old origin has no other name.
    origins = {row["adapter_id"]: row["origin"] for row in old["embeddings"]}
    namespaces: dict[str, datetime] = {}
    for row in old["adapters"]:
        namespaces[row["namespace"]] = min(row["created_at"], namespaces.get(row["namespace"], row["created_at"]))
    _insert("namespaces", [{"name": name, "created_at": at} for name, at in sorted(namespaces.items())])
    _insert("adapters", [_adapter(row, origins.get(row["id"], "samples")) for row in old["adapters"]])
    _insert("revisions", [_revision(row) for row in old["adapters"]])
    _insert(
        "tags",
        [
            {"adapter_id": row["id"], "tag": tag, "position": place, "given": True}
            for row in old["adapters"]
            for place, tag in enumerate(row["tags"])
        ],
    )
    _insert("samples", old["samples"])
    _insert(
        "embeddings",
        [
            {key: row[key] for key in ("adapter_id", "encoder", "vector")} | {"id": number}
            for number, row in enumerate(old["embeddings"], start=1)
        ],
    )
    _insert(
        "events",
        [
            {
                "id": number,
                "version": version,
                "at": now,
                "actor": "lora-hub db upgrade",
                "action": "migrated",
                "adapter_id": row["id"],
                "namespace": row["namespace"],
                "name": row["name"],
                "detail": {"from": "0001", "to": "0002"},
            }
            for number, row in enumerate(old["adapters"], start=1)
        ],
    )


def _adapter(row: dict[str, Any], origin: str) -> dict[str, Any]:
    kept = ("id", "namespace", "name", "base_model", "sample_count", "created_at")
    return {
        **{key: row[key] for key in kept},
        "state": "active",
        "pinned": False,
        "follows": None,
        "description": row["description"],
        "origin": origin,
        "updated_at": row["created_at"],
    }


def _revision(row: dict[str, Any]) -> dict[str, Any]:
    kept = (
        "repo_id",
        "revision",
        "digest",
        "rank",
        "alpha",
        "target_modules",
        "size_bytes",
        "license",
        "folder",
        "created_at",
    )
    return {
        **{key: row[key] for key in kept},
        "id": row["id"],
        "adapter_id": row["id"],
        "current": True,
        "description": None,
    }


def _insert(name: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        op.bulk_insert(sa.Table(name, sa.MetaData(), autoload_with=op.get_bind()), rows)
