"""From prompts to routes: search, or the adapters that were named, and what a strategy makes of them."""

from __future__ import annotations

from collections.abc import Sequence

from lora_hub_sdk.composition.strategies import Strategy, check_routing, get_strategy, route_from_hits
from lora_hub_sdk.errors import ConfigurationError, NoAdaptersError
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.fitting import FitRule, fitting_hits
from lora_hub_sdk.retriever.query import check_prompts
from lora_hub_sdk.retriever.reranker import CANDIDATES
from lora_hub_sdk.retriever.retriever import Retriever
from lora_hub_sdk.retriever.settings import settings_of
from lora_hub_sdk.types import Hit, Member, Route, Routing


class Router:
    """Routes prompts over one registry. ``retriever`` is asked only when something has to be searched."""

    def __init__(self, registry: Registry, retriever: Retriever) -> None:
        self._registry = registry
        self._retriever = retriever

    def route(self, prompts: Sequence[str], base_model: str, routing: Routing) -> list[Route]:
        """One route for each prompt; ``base_model`` in canonical spelling.

        Raises:
            UnknownStrategyError, ConfigurationError, EmptyPromptError: a call that makes no sense.
            AdapterNotFoundError, RetiredError: a named adapter is not registered, or was taken out of service.
            NoAdaptersError: nothing to route to.
        """
        check_routing(routing)
        check_prompts(prompts)
        strategy = get_strategy(routing.strategy)
        if routing.adapters is not None:
            return [self._named(strategy, base_model, routing)] * len(prompts)
        if strategy.limit == 0:
            return [route_from_hits(strategy, ())] * len(prompts)
        return self._searched(strategy, prompts, base_model, routing)

    def _named(self, strategy: Strategy, base_model: str, routing: Routing) -> Route:
        adapters = [self._registry.in_service(name, routing.namespace) for name in routing.adapters or ()]
        for adapter in adapters:
            if adapter.base_model != base_model:
                raise ConfigurationError(
                    f"adapter {adapter.name!r} is for base {adapter.base_model!r}, asked for was {base_model!r}"
                )
        members = tuple(Member(adapter, 1.0 / len(adapters)) for adapter in adapters)
        return Route(strategy.name, strategy.averaged, members)

    def _searched(self, strategy: Strategy, prompts: Sequence[str], base_model: str, routing: Routing) -> list[Route]:
        width = strategy.width(routing.k)
        # Words may bring forward what the bound drops; then those behind come up, as they do without words.
        wide = width if routing.min_score is None else max(width, CANDIDATES)
        if isinstance(routing.min_score, str):
            found = self._fitting(prompts, wide, base_model, routing)
        else:
            found = [_above(hits, routing.min_score) for hits in self._nearest(prompts, wide, base_model, routing)]
        return [route_from_hits(strategy, hits[:width], routing.weights) for hits in found]

    def _nearest(self, prompts: Sequence[str], k: int, base_model: str, routing: Routing) -> list[list[Hit]]:
        found = self._retriever.search_many(prompts, k, routing.allowed(base_model), routing.rerank)
        if not all(found):
            raise NoAdaptersError(self._why_none(base_model, routing))
        return found

    def _fitting(self, prompts: Sequence[str], k: int, base_model: str, routing: Routing) -> list[list[Hit]]:
        """The hits that fit by what was calibrated for the namespace, or else for the encoder."""
        while True:
            encoder = self._retriever.encoder
            kept = self._registry.fit_rule(routing.namespace, encoder.fingerprint)
            floor = settings_of(encoder).min_score
            if kept is None and floor is None:
                raise ConfigurationError(
                    f'min_score="auto": nothing was calibrated for namespace {routing.namespace!r} with encoder '
                    f"{encoder.name!r}; run hub.calibrate() or lora-hub calibrate, and again after the encoder was "
                    "switched, or give a number"
                )
            found = self._nearest(prompts, k, base_model, routing)
            # Scores of an encoder that it was switched to meanwhile say nothing to this bound.
            if self._retriever.encoder.fingerprint == encoder.fingerprint:
                break
        if kept is None:
            return [_above(hits, floor) for hits in found]
        return fitting_hits(FitRule.of_text(kept), prompts, found, self._retriever.reranker.profiles)

    def _why_none(self, base_model: str, routing: Routing) -> str:
        there = self._registry.adapters(routing.namespace)
        if not there:
            return (
                f"namespace {routing.namespace!r} holds no adapters; register some with "
                "hub.register('user/lora-x', samples=[...]), or ask for strategy='base'"
            )
        bases = sorted({adapter.base_model for adapter in there})
        return (
            f"no adapter for base {base_model!r} is left by tags={list(routing.tags)!r}, "
            f"exclude={list(routing.exclude)!r}; namespace {routing.namespace!r} holds {len(there)} adapters, for "
            f"{', '.join(bases)}; if a folder is one of these, say so: LoraHub(..., base_folders={{name: folder}})"
        )


def _above(hits: Sequence[Hit], floor: float | None) -> list[Hit]:
    return [hit for hit in hits if floor is None or hit.score >= floor]
