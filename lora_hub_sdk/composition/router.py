"""From prompts to routes: search, or the adapters that were named, and what a strategy makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_hub_sdk.composition.strategies import Strategy, check_routing, get_strategy, route_from_hits
from lora_hub_sdk.errors import ConfigurationError, NoAdaptersError
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.encoder import Encoder
from lora_hub_sdk.retriever.query import check_prompts
from lora_hub_sdk.retriever.retriever import Retriever
from lora_hub_sdk.types import Member, Route, Routing


class Router:
    """Routes prompts over one registry. ``encoder`` is asked for only when something has to be searched."""

    def __init__(self, registry: Registry, encoder: Callable[[], Encoder]) -> None:
        self._registry = registry
        self._encoder = encoder

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
        found = Retriever(self._registry, self._encoder()).search_many(
            prompts, strategy.width(routing.k), routing.allowed(base_model)
        )
        if not all(found):
            raise NoAdaptersError(self._why_none(base_model, routing))
        floor = -1.0 if routing.min_score is None else routing.min_score
        return [
            route_from_hits(strategy, [hit for hit in hits if hit.score >= floor], routing.weights) for hits in found
        ]

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
