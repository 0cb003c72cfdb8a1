"""Registrations made by hand: no files, no encoder, any vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lora_hub_sdk.registry.adapter_config import AdapterConfig
from lora_hub_sdk.registry.admission import Admitted
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.records import Registration, Representation
from lora_hub_sdk.registry.source import Pulled
from lora_hub_sdk.types import Origin

ENCODER = "e" * 64


def unit(*values: float) -> Vector:
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def represented(
    vector: Vector, texts: tuple[str, ...] = ("one", "two"), origin: Origin = "samples", encoder: str = ENCODER
) -> Representation:
    return Representation(vector, encoder, "hand", origin, texts, len(texts))


def entry(
    name: str,
    vector: Vector | None,
    *,
    digest: str | None = None,
    revision: str = "a" * 40,
    license: str | None = "mit",  # noqa: A002
    card_tags: tuple[str, ...] = (),
    folder: str = "/nowhere",
    samples: tuple[str, ...] = ("one", "two"),
    origin: Origin = "samples",
    encoder: str = ENCODER,
    **changes: Any,
) -> Registration:
    """A registration of content that depends on its name alone; without a vector, one that keeps it."""
    fields: dict[str, Any] = {
        "name": name,
        "namespace": "default",
        "pulled": Pulled(f"user/{name}", revision, Path(folder), license, None, card_tags, False),
        "admitted": Admitted(AdapterConfig("base", 4, 8.0), digest or name.ljust(64, "0"), ("m.q_proj",), 10),
        "base_model": "base",
        "representation": None if vector is None else represented(vector, samples, origin, encoder),
    }
    return Registration(**{**fields, **changes})
