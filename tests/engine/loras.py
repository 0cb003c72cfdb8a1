"""Random adapters over a few modules in memory, and the paper's einsum over them: what a row's delta has to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.composition.reference import fusion_einsum, mixture_einsum, stack_padded
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.types import Route
from tests.support import bare_adapter, route_of

#: (d_out, d_in): three modules of one input, two of them equally wide, and one by itself.
SHAPES: Final[Mapping[str, tuple[int, int]]] = {"q": (12, 8), "k": (4, 8), "v": (4, 8), "o": (8, 12)}
GROUPS: Final = [("q", "k", "v"), ("o",)]
CPU: Final = torch.device("cpu")
#: The rank in each module: some adapters lack modules, some have another rank in one of them.
RANKS: Final[Sequence[Mapping[str, int]]] = (
    {"q": 3, "k": 3, "v": 1, "o": 3},
    {"q": 1, "v": 1},
    {"o": 5},
    {"q": 2, "k": 6, "v": 2},
    {"q": 4, "k": 4, "v": 4, "o": 4},
    {"k": 1},
)


def factors_of(name: str, ranks: Mapping[str, int], *, seed: int, dtype: torch.dtype = torch.float32) -> AdapterFactors:
    """Random factors with a scale of each module's own; the digest is that of ``bare_adapter(name)``."""
    draw = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraFactors(
            torch.randn(rank, SHAPES[path][1], generator=draw).to(dtype),
            torch.randn(SHAPES[path][0], rank, generator=draw).to(dtype),
            scale=1.0 if place == 1 else 0.25 + seed % 7,
        )
        for place, (path, rank) in enumerate(ranks.items())
    }
    return AdapterFactors(bare_adapter(name).digest, modules)


ADAPTERS: Final = [factors_of(f"lora{place}", ranks, seed=place) for place, ranks in enumerate(RANKS)]
_BY_DIGEST: Final = {adapter.digest: adapter for adapter in ADAPTERS}


def routes() -> st.SearchStrategy[Route]:
    """Mixtures and fusions of none to four of ``ADAPTERS``, some twice, some without weight."""
    weight = st.one_of(st.just(0.0), st.floats(-1.0, 1.0, width=16))
    member = st.tuples(st.integers(0, len(ADAPTERS) - 1).map(lambda place: bare_adapter(f"lora{place}")), weight)
    return st.builds(
        lambda strategy, members: route_of(strategy, *members),
        st.sampled_from(["mixture", "fusion"]),
        st.lists(member, max_size=4),
    )


def pool_of(dtype: torch.dtype = torch.float32) -> RankPool:
    return RankPool(GROUPS, SHAPES, dtype=dtype, device=CPU, budget_bytes=1 << 20)


def placed(route: Route, pool: RankPool) -> RowLora:
    """A row with that route, its adapters in the pool."""
    terms = terms_of(route, {digest: adapter.rank for digest, adapter in _BY_DIGEST.items()})
    return RowLora(terms, tuple(row for digest in terms.digests for row in pool.pin(_BY_DIGEST[digest])))


def batch_of(routes_: Sequence[Route], pool: RankPool) -> BatchLora:
    return BatchLora([placed(route, pool) for route in routes_], device=CPU, dtype=torch.float32)


def expected_delta(path: str, x: Tensor, route: Route) -> Tensor:
    """What one row (l, d_in) gets in a module, (l, d_out), by the paper's formulas."""
    found = [(member.weight, _BY_DIGEST[member.adapter.digest].modules.get(path)) for member in route.members]
    present = [(weight, factors) for weight, factors in found if factors is not None]
    if not present:
        return torch.zeros(len(x), SHAPES[path][0])
    oracle = mixture_einsum if route.averaged == "outputs" else fusion_einsum
    matrix = torch.tensor([[weight for weight, _ in present]])
    return oracle(x[None], *stack_padded([factors for _, factors in present]), matrix)[0]
