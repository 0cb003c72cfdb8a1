"""What a forking server imports once, so that the children of the crash and crowd tests start in milliseconds."""

# ruff: noqa: F401
import alembic.command
import alembic.environment
import alembic.migration
import chromadb.api.rust
import huggingface_hub.file_download
import huggingface_hub.utils._cache_manager
import psycopg
import pytest  # children run the parent's main script again, and this is all that it imports
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite.pysqlite
import torch
import transformers.models.llama.configuration_llama
import transformers.models.llama.modeling_llama

import lora_hub_sdk.engine.adapter_file
import lora_hub_sdk.engine.adapter_store
import lora_hub_sdk.registry.discovery
import lora_hub_sdk.registry.schema
import tests.registry.crowd
