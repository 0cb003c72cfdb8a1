"""From prompts to routes: search, or the adapters that were named, and what a strategy makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.composition.gate_choice import missing_gate, unknown_expert
from lora_hub_sdk.composition.gates import Gate
from lora_hub_sdk.composition.strategies import Strategy, check_routing, get_strategy, route_from_hits
from lora_hub_sdk.composition.weigher import Weigher
from lora_hub_sdk.composition.weighting import uniform
from lora_hub_sdk.errors import AdapterNotFoundError, ConfigurationError, NoAdaptersError
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.fitting import FitRule, fitting_hits
from lora_hub_sdk.retriever.query import check_prompts
from lora_hub_sdk.retriever.reranker import CANDIDATES
from lora_hub_sdk.retriever.retriever import Retriever
from lora_hub_sdk.retriever.settings import settings_of
from lora_hub_sdk.types import Hit, Member, Route, Routing


class Router:
    """Routes prompts over one registry.

    Args:
        retriever: is asked only when something has to be searched.
        gates: the gates in use for a base model, by strategy; those over experts have the adapters of their routes.
    """

    def __init__(
        self,
        registry: Registry,
        retriever: Retriever,
        gates: Callable[[str], Mapping[str, Gate]] = lambda _: {},
    ) -> None:
        self._registry = registry
        self._retriever = retriever
        self._gates = gates
        self._weigher = Weigher(registry, retriever)

    def route(self, prompts: Sequence[str], base_model: str | None, routing: Routing) -> list[Route]:
        """One route for each prompt; ``base_model`` and ``routing.bases`` in canonical spelling.

        Without a base model, a prompt's is that of its nearest adapter among all of ``routing.bases``, those below
        ``min_score`` coming last; its route is then found among the adapters for that base alone.

        Raises:
            UnknownStrategyError, ConfigurationError, EmptyPromptError: a call that makes no sense.
            ConfigurationError: a strategy over fixed experts without a gate in use, or whose experts changed.
            AdapterNotFoundError, RetiredError: a named adapter is not registered, or was taken out of service.
            NoAdaptersError: nothing to route to.
        """
        check_routing(routing)
        check_base(base_model, routing)
        check_prompts(prompts)
        strategy = get_strategy(routing.strategy)
        if routing.adapters is not None:
            return [self._named(strategy, base_model, routing)] * len(prompts)
        if strategy.fixed:
            return [self._experts(strategy, base_model or "", routing)] * len(prompts)
        if base_model is None:
            return self._by_nearest(strategy, prompts, routing)
        if strategy.limit == 0:
            return [replace(route_from_hits(strategy, ()), base_model=base_model)] * len(prompts)
        return self._searched(strategy, prompts, base_model, routing)

    def _named(self, strategy: Strategy, base_model: str | None, routing: Routing) -> Route:
        adapters = [self._registry.in_service(name, routing.namespace) for name in routing.adapters or ()]
        first = adapters[0]
        for adapter in adapters:
            if base_model is not None and adapter.base_model != base_model:
                raise ConfigurationError(
                    f"adapter {adapter.name!r} is for base {adapter.base_model!r}, asked for was {base_model!r}"
                )
            if adapter.base_model != first.base_model:
                raise ConfigurationError(
                    f"adapter {adapter.name!r} is for base {adapter.base_model!r}, {first.name!r} for "
                    f"{first.base_model!r}; name adapters for one base"
                )
        if routing.bases is not None and first.base_model not in routing.bases:
            raise ConfigurationError(
                f"adapter {first.name!r} is for base {first.base_model!r}, bases={list(routing.bases)!r} leaves it out"
            )
        if strategy.fixed:
            gate = self._gate(strategy, first.base_model)
            for adapter in adapters:
                if adapter.digest not in gate.experts.values():
                    raise unknown_expert(adapter.name, gate)
        weights = routing.adapter_weights or uniform(adapters)
        members = tuple(Member(one, float(weight)) for one, weight in zip(adapters, weights, strict=True) if weight)
        return Route(strategy.name, strategy.averaged, members, first.base_model)

    def _experts(self, strategy: Strategy, base_model: str, routing: Routing) -> Route:
        """The adapters of the gate in use, but for those left out."""
        gate = self._gate(strategy, base_model)
        members = []
        for name, digest in gate.experts.items():
            if name in routing.exclude:
                continue
            try:
                adapter = self._registry.in_service(name, routing.namespace)
            except AdapterNotFoundError:
                # Without its name, which may be another namespace's.
                raise ConfigurationError(
                    f"the gate in use for strategy {strategy.name!r} has experts that namespace {routing.namespace!r} "
                    "does not hold; make one for it with hub.train_experts(namespace=...)"
                ) from None
            if adapter.digest != digest or adapter.base_model != base_model:
                raise unknown_expert(name, gate)
            members.append(adapter)
        if not members:
            raise NoAdaptersError(
                f"exclude={list(routing.exclude)!r} leaves out all experts of the gate in use for strategy "
                f"{strategy.name!r}"
            )
        shares = uniform(members)
        found = tuple(Member(one, share) for one, share in zip(members, shares, strict=True))
        return Route(strategy.name, strategy.averaged, found, base_model)

    def _gate(self, strategy: Strategy, base_model: str) -> ExpertGate:
        gate = self._gates(base_model).get(strategy.name)
        if not isinstance(gate, ExpertGate):
            raise missing_gate(strategy.name, base_model)
        return gate

    def _by_nearest(self, strategy: Strategy, prompts: Sequence[str], routing: Routing) -> list[Route]:
        places: dict[str, list[int]] = {}
        for place, base_model in enumerate(self._nearest_bases(prompts, routing)):
            places.setdefault(base_model, []).append(place)
        routes: dict[int, Route] = {}
        for base_model, asked in places.items():
            found = self._searched(strategy, [prompts[place] for place in asked], base_model, routing)
            routes.update(zip(asked, found, strict=True))
        return [routes[place] for place in range(len(prompts))]

    def _nearest_bases(self, prompts: Sequence[str], routing: Routing) -> list[str]:
        known = self._registry.base_models(routing.namespace) if routing.bases is None else set(routing.bases)
        if len(known) == 1:  # whether there are adapters for it, the search for the route will see
            return [*known] * len(prompts)
        return [(fit or near)[0].adapter.base_model for near, fit in self._found(prompts, 1, None, routing)]

    def _searched(self, strategy: Strategy, prompts: Sequence[str], base_model: str, routing: Routing) -> list[Route]:
        width = strategy.width(routing.k)

        def find() -> list[list[Hit]]:
            return [fit[:width] for _, fit in self._found(prompts, width, base_model, routing)]

        found, shares = self._weigher.weighed(prompts, find, routing)
        routes = [route_from_hits(strategy, *one) for one in zip(found, shares, strict=True)]
        return [replace(route, base_model=base_model) for route in routes]

    def _found(
        self, prompts: Sequence[str], width: int, base_model: str | None, routing: Routing
    ) -> list[tuple[list[Hit], list[Hit]]]:
        """The nearest of each prompt, at least one, and those of them that ``min_score`` leaves."""
        # Words may bring forward what the bound drops; then those behind come up, as they do without words.
        wide = width if routing.min_score is None else max(width, CANDIDATES)
        if isinstance(routing.min_score, str):
            return self._fitting(prompts, wide, base_model, routing)
        found = self._nearest(prompts, wide, base_model, routing)
        return [(hits, _above(hits, routing.min_score)) for hits in found]

    def _nearest(self, prompts: Sequence[str], k: int, base_model: str | None, routing: Routing) -> list[list[Hit]]:
        found = self._retriever.search_many(prompts, k, routing.allowed(base_model), routing.rerank)
        if not all(found):
            raise NoAdaptersError(self._why_none(base_model, routing))
        return found

    def _fitting(
        self, prompts: Sequence[str], k: int, base_model: str | None, routing: Routing
    ) -> list[tuple[list[Hit], list[Hit]]]:
        """All hits, and those that fit by what was calibrated for the namespace, or else for the encoder."""
        while True:
            encoder = self._retriever.encoder
            kept = self._registry.rule("fit-rule", routing.namespace, encoder.fingerprint)
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
            return [(hits, _above(hits, floor)) for hits in found]
        fits = fitting_hits(FitRule.of_text(kept), prompts, found, self._retriever.reranker.profiles)
        return list(zip(found, fits, strict=True))

    def _why_none(self, base_model: str | None, routing: Routing) -> str:
        there = self._registry.adapters(routing.namespace)
        if not there:
            return (
                f"namespace {routing.namespace!r} holds no adapters; register some with "
                "hub.register('user/lora-x', samples=[...]), or ask for strategy='base'"
            )
        bases = sorted({adapter.base_model for adapter in there})
        asked = (base_model,) if base_model is not None else routing.bases
        wanted = "any base" if asked is None else f"base {' or '.join(map(repr, asked))}"
        return (
            f"no adapter for {wanted} is left by tags={list(routing.tags)!r}, "
            f"exclude={list(routing.exclude)!r}; namespace {routing.namespace!r} holds {len(there)} adapters, for "
            f"{', '.join(bases)}; if a folder is one of these, say so: LoraHub(..., base_folders={{name: folder}})"
        )


def check_base(base_model: str | os.PathLike[str] | None, routing: Routing) -> None:
    """Refuse a routing that does not go with the base model that was asked for, or with none.

    Raises:
        ConfigurationError: ``bases`` that make no sense or stand beside a base model, or none where one is needed.
    """
    bases = routing.bases
    listed = isinstance(bases, tuple | list) and all(isinstance(name, str | os.PathLike) for name in bases)
    if not (bases is None or bases == "loaded" or (bases and listed)):
        raise ConfigurationError(f'bases={bases!r}: expected names of base models, "loaded", or None for all')
    if base_model is not None and bases is not None:
        raise ConfigurationError(
            f"base_model={os.fspath(base_model)!r} and bases={bases!r} were both given; bases is for calls that leave "
            "the base model to the search, with base_model=None"
        )
    strategy = get_strategy(routing.strategy)
    if base_model is None and routing.adapters is None and (strategy.limit == 0 or strategy.fixed):
        raise ConfigurationError(
            f"strategy {routing.strategy!r} searches for no adapter that could tell the base model; give base_model=..."
        )


def _above(hits: Sequence[Hit], floor: float | None) -> list[Hit]:
    return [hit for hit in hits if floor is None or hit.score >= floor]
