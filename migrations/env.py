"""Alembic's entry: the connection comes from ``lora_hub_sdk.registry.schema``, never from an ini file."""

from __future__ import annotations

from alembic import context

from lora_hub_sdk.registry.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite cannot alter a column in place; batch mode rebuilds the table.
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
