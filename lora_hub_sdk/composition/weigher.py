"""Weighs the hits of each prompt as a routing says, with numbers that were learned for the encoder that found them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_hub_sdk.composition.weighting import LEARNED, WeightRule, similarity, uniform
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.fitting import hit_wordings
from lora_hub_sdk.retriever.retriever import Retriever
from lora_hub_sdk.types import Hit, Routing


class Weigher:
    """Weighs hits of one registry. Thread-safe."""

    def __init__(self, registry: Registry, retriever: Retriever) -> None:
        self._registry = registry
        self._retriever = retriever

    def weighed(
        self, prompts: Sequence[str], find: Callable[[], list[list[Hit]]], routing: Routing
    ) -> tuple[list[list[Hit]], list[list[float]]]:
        """What ``find`` found for each prompt, and a weight for each hit, 0 or more, with a sum of 1.

        Raises:
            ConfigurationError: weights that nobody learned for the namespace and the encoder.
            As ``find``.
        """
        name = routing.weights
        if name not in LEARNED:
            weigh = similarity if name == "similarity" else uniform
            found = find()
            return found, [weigh([hit.score for hit in hits]) if hits else [] for hits in found]
        while True:
            encoder = self._retriever.encoder
            kept = self._registry.rule("weights", routing.namespace, encoder.fingerprint)
            if kept is None:
                raise ConfigurationError(
                    f"weights={name!r}: none were learned for namespace {routing.namespace!r} with encoder "
                    f"{encoder.name!r}; run hub.fit_weights() or lora-hub fit-weights, and again after the encoder was "
                    'switched, or take "uniform" or "similarity"'
                )
            found = find()
            # Scores of an encoder that it was switched to meanwhile mean nothing to these numbers.
            if self._retriever.encoder.fingerprint == encoder.fingerprint:
                break
        rule = WeightRule.of_text(kept)
        words = hit_wordings(prompts, found, self._retriever.reranker.profiles) if name == "gate" else None
        return found, [
            [float(weight) for weight in rule.weights(name, [hit.score for hit in hits], words[place] if words else ())]
            if hits
            else []
            for place, hits in enumerate(found)
        ]
