"""Which adapters fit a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.encoder import Encoder, mean_vector, unit
from lora_hub_sdk.retriever.query import check_k, check_prompts
from lora_hub_sdk.types import AdapterFilter, Hit


class Retriever:
    """Searches a registry with an encoder. Thread-safe."""

    def __init__(self, registry: Registry, encoder: Encoder) -> None:
        self._registry = registry
        self._encoder = encoder

    def search_many(
        self,
        prompts: Sequence[str],
        k: int,
        allowed: AdapterFilter,
    ) -> list[list[Hit]]:
        """For each prompt its up to k nearest adapters, best first. All prompts are encoded in one call.

        Raises:
            ConfigurationError: k is not a whole number of 1 or more.
            EmptyPromptError: a prompt without text.
        """
        check_k(k)
        check_prompts(prompts)
        if not prompts:
            return []
        return self._registry.search(list(self._encoder.encode(prompts)), k, allowed)


def embed_samples(encoder: Encoder, texts: Sequence[str], source: str) -> Vector:
    """The vector of an adapter from its samples.

    Raises:
        SamplesError: the samples' vectors cancel out.
    """
    return _directed(mean_vector, encoder.encode(texts), source)


def given_vector(embedding: ArrayLike, encoder: Encoder, source: str) -> Vector:
    """An owner's own vector, checked and brought to length 1.

    Raises:
        SamplesError: another dimension than the encoder's, or no direction.
    """
    try:
        vector = np.asarray(embedding, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SamplesError(source, f"embedding is no vector of numbers: {error}") from error
    if vector.shape != (encoder.dimension,):
        raise SamplesError(
            source,
            f"embedding has shape {vector.shape}, encoder {encoder.name!r} makes vectors of {encoder.dimension}",
        )
    return _directed(unit, vector, source)


def _directed(make: Any, value: Any, source: str) -> Vector:
    try:
        vector: Vector = make(value)
    except ValueError as error:
        raise SamplesError(source, str(error)) from error
    return vector
