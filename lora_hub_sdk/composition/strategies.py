"""The strategies as a table: how many adapters of a search take part, and where they are averaged.

Each system of the paper is three answers: which set, whose weights, averaged where. A strategy here gives the first
and the last; ``weighting`` has the middle one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.composition.weighting import WEIGHTINGS, uniform
from lora_hub_sdk.errors import ConfigurationError, UnknownStrategyError
from lora_hub_sdk.retriever.query import check_k
from lora_hub_sdk.types import Averaged, Hit, Member, Route, Routing


@dataclass(frozen=True, slots=True)
class Strategy:
    """``limit`` bounds the number of adapters of a route; None leaves it to k.

    Where ``fixed``, nothing is searched: a gate in use has the adapters, its experts.
    """

    name: str
    averaged: Averaged
    limit: int | None = None
    fixed: bool = False

    def width(self, k: int) -> int:
        """How many adapters to search for when the caller asks for k."""
        return k if self.limit is None else min(k, self.limit)


STRATEGIES: Final[Mapping[str, Strategy]] = {
    strategy.name: strategy
    for strategy in (
        # The base model alone, for comparison.
        Strategy("base", "outputs", limit=0),
        # The nearest adapter (paper section 4.2, "selection").
        Strategy("selection", "outputs", limit=1),
        # The mean of the adapters' outputs (paper section 4.2).
        Strategy("mixture", "outputs"),
        # The mean of the adapters' A and of their B (paper eq. 4), cross terms and all.
        Strategy("fusion", "parameters"),
        # The outputs again, weighed by a trained gate at each token and module (RAMoLE, arXiv 2406.16989).
        Strategy("ramole", "tokens"),
        # A few experts, weighed by a linear router at each token and module: all of them, or the best (paper 5.1).
        Strategy("moe-soft", "tokens", fixed=True),
        Strategy("moe-top3", "tokens", fixed=True),
        Strategy("moe-top1", "tokens", fixed=True),
        # Their parameters, weighed once for each prompt and module (SMEAR, arXiv 2306.03745).
        Strategy("smear", "prompt", fixed=True),
        # A whole pool, by how much each token points along what an adapter reads most (Arrow, arXiv 2405.11157).
        Strategy("arrow", "tokens", fixed=True),
    )
}


def get_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        UnknownStrategyError: with the names that exist.
    """
    try:
        return STRATEGIES[name]
    except (KeyError, TypeError):
        raise UnknownStrategyError(name, tuple(STRATEGIES)) from None


def check_routing(routing: Routing) -> None:
    """Refuse options that no prompt could be routed by.

    Raises:
        UnknownStrategyError, ConfigurationError: names the option, its value and what is expected.
    """
    strategy = get_strategy(routing.strategy)
    check_k(routing.k)
    if routing.weights not in WEIGHTINGS:
        raise ConfigurationError(f"weights={routing.weights!r} is unknown; choose one of {', '.join(WEIGHTINGS)}")
    floor = routing.min_score
    number = isinstance(floor, int | float) and not isinstance(floor, bool) and math.isfinite(floor)
    if not (floor is None or floor == "auto" or number):
        raise ConfigurationError(f'min_score={floor!r}: expected a cosine from -1 to 1, "auto", or None')
    names = routing.adapters
    _check_adapter_weights(names, routing.adapter_weights)
    if names is None:
        return
    if not names or (strategy.limit is not None and len(names) > strategy.limit):
        raise ConfigurationError(
            f"adapters={list(names)!r} with strategy {strategy.name!r}: expected "
            f"{'at least one name' if strategy.limit is None else f'{strategy.limit} name(s)'}"
        )


def _check_adapter_weights(names: Sequence[str] | None, weights: Sequence[float] | None) -> None:
    if weights is None:
        return
    listed = list(weights) if isinstance(weights, tuple | list) else None
    if names is None or listed is None or len(listed) != len(names):
        raise ConfigurationError(
            f"adapter_weights={weights!r} with adapters={names!r}: expected one number for each adapter that is named"
        )
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in listed)
    if not numbers or not any(listed):
        raise ConfigurationError(f"adapter_weights={weights!r}: expected finite numbers, not all of them 0")


def route_from_hits(strategy: Strategy, hits: Sequence[Hit], shares: Sequence[float] | None = None) -> Route:
    """The route of one prompt from its hits, best first, weighed by ``shares``, or all alike.

    Adapters without weight are left out. No hits: the base model's route.
    """
    chosen = hits[: strategy.width(len(hits))]
    if not chosen:
        return Route(strategy.name, strategy.averaged)
    weights = uniform([hit.score for hit in chosen]) if shares is None else shares
    members = (Member(hit.adapter, share, hit.score) for hit, share in zip(chosen, weights, strict=True) if share)
    return Route(strategy.name, strategy.averaged, tuple(members))
