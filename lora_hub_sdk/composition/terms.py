"""A static route as one LoRA over its members' stacked ranks: which ranks, and how their activations mix. Pure.

With h = the activations A_i x of all members, stacked rank by rank, every static strategy is one small mixing

    h'[s] = sum_j weights[s][j] * h[partners[s][j]]        and then        delta = [s_i B_i] h'

mixture:  each rank keeps its own activation times its member's weight, so the delta is sum w_i s_i B_i A_i x.
fusion:   ranks of the same depth are averaged first, which is (sum w_i s_i B_i)(sum w_j A_j) x, cross terms and all
          (paper eq. 4), with ranks zero-padded to the largest.

So nothing has to be composed: adapters stay as they are, and a route is a few indices and weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lora_hub_sdk.types import GATED, Averaged, Route

#: (digest, rank, weight) of each member.
Members = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True, slots=True)
class RouteTerms:
    """R stacked ranks: those of ``digests`` one after the other. ``partners`` and ``weights`` are R x J.

    J is 1 in a mixture, and the number of members that reach a depth in a fusion. ``shares`` are the members' weights,
    ``owners`` tells for each rank its place among ``digests``, and ``depths`` its place in its adapter. Where
    ``gated``, weights come from a gate instead; where ``fused``, ranks of one depth are averaged, whoever weighs them.
    """

    digests: tuple[str, ...]
    shares: tuple[float, ...]
    owners: tuple[int, ...]
    depths: tuple[int, ...]
    partners: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    gated: bool = False
    fused: bool = False

    @property
    def size(self) -> int:
        """R, the number of stacked ranks."""
        return len(self.partners)


def terms_of(route: Route, ranks: Mapping[str, int]) -> RouteTerms:
    """The terms of a route; ``ranks`` gives the largest rank of each member by its digest.

    Members are the same when their content is, whatever their names: their weights are added. A member without weight
    is left out. Equal routes get the same object.
    """
    weights: dict[str, float] = {}
    for member in route.members:
        digest = member.adapter.digest
        weights[digest] = weights.get(digest, 0.0) + member.weight
    members = tuple((digest, ranks[digest], weight) for digest, weight in weights.items() if weight != 0.0)
    return _terms(members, route.averaged)


@lru_cache(maxsize=4096)
def _terms(members: Members, averaged: Averaged) -> RouteTerms:
    owners = [(depth, weight) for _, rank, weight in members for depth in range(rank)]
    partners: tuple[tuple[int, ...], ...]
    mixing: tuple[tuple[float, ...], ...]
    if averaged != "parameters":
        partners = tuple((place,) for place in range(len(owners)))
        mixing = tuple((weight,) for _, weight in owners)
    else:
        level = {depth: tuple(at for at, (own, _) in enumerate(owners) if own == depth) for depth, _ in owners}
        partners = tuple(level[depth] for depth, _ in owners)
        mixing = tuple(tuple(weight * owners[other][1] for other in level[depth]) for depth, weight in owners)
    return RouteTerms(
        digests=tuple(digest for digest, _, _ in members),
        shares=tuple(weight for _, _, weight in members),
        owners=tuple(place for place, (_, rank, _) in enumerate(members) for _ in range(rank)),
        depths=tuple(depth for depth, _ in owners),
        partners=partners,
        weights=mixing,
        gated=averaged in GATED,
        fused=averaged in ("parameters", "prompt"),
    )
