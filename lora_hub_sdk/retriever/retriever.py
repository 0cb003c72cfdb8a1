"""Which adapters fit a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_hub_sdk.errors import ConfigurationError, EncoderMismatchError, SamplesError
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.encoder import Encoder, mean_vector, unit
from lora_hub_sdk.retriever.query import check_k, check_prompts
from lora_hub_sdk.retriever.reranker import CANDIDATES, LexicalReranker
from lora_hub_sdk.retriever.settings import settings_of
from lora_hub_sdk.types import AdapterFilter, Hit


class Retriever:
    """Searches a registry with its encoder. Thread-safe.

    Args:
        encoder: gives the encoder of the moment.
        rerank: whether searches rerank where they do not say; None is what the encoder's settings say.
    """

    def __init__(
        self,
        registry: Registry,
        encoder: Callable[[], Encoder],
        *,
        rerank: bool | None = None,
    ) -> None:
        self.reranker = LexicalReranker(registry)
        self._registry = registry
        self._encoder = encoder
        self._rerank = _checked(rerank)

    @property
    def encoder(self) -> Encoder:
        """The encoder of the moment."""
        return self._encoder()

    @property
    def reranks(self) -> bool:
        """Whether searches rerank now, where they do not say."""
        return self._reranks(None, self._encoder())

    def search_many(
        self,
        prompts: Sequence[str],
        k: int,
        allowed: AdapterFilter,
        rerank: bool | None = None,
    ) -> list[list[Hit]]:
        """For each prompt its up to k nearest adapters, best first. All prompts are encoded in one call.

        Args:
            rerank: whether the 50 nearest come in the order of their words too; None leaves it to the retriever. The
                first of a wide search are those of a narrow one.

        Raises:
            ConfigurationError: k is not a whole number of 1 or more, or rerank is no bool.
            EmptyPromptError: a prompt without text.
        """
        check_k(k)
        _checked(rerank)
        check_prompts(prompts)
        if not prompts:
            return []
        while True:
            encoder = self._encoder()
            reranks = self._reranks(rerank, encoder)
            width = max(k, CANDIDATES) if reranks else k
            try:
                found = self._registry.search(list(encoder.encode(prompts)), width, allowed, encoder.fingerprint)
            except EncoderMismatchError:
                # Switched while the prompts were encoded, and adapters came since that the encoder before never saw.
                if self._encoder().fingerprint == encoder.fingerprint:
                    raise
                continue
            return [hits[:k] for hits in self.reranker.rerank(prompts, found)] if reranks else found

    def _reranks(self, asked: bool | None, encoder: Encoder) -> bool:
        told = self._rerank if asked is None else asked
        return settings_of(encoder).rerank if told is None else told


def _checked(rerank: bool | None) -> bool | None:
    # Any text, "no" as well, would count as yes.
    if rerank is not None and not isinstance(rerank, bool):
        raise ConfigurationError(f"rerank={rerank!r}: expected True, False, or None for what the encoder says")
    return rerank


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
