"""AdapterSoup (arXiv 2302.07027): one set of adapters for all that is asked, their parameters averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub_sdk.errors import NoAdaptersError
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow


@dataclass(frozen=True, slots=True)
class AdapterSoup:
    """The ``k`` adapters whose vectors have the highest mean cosine with the training rows of all tasks, weighed alike.

    This is the choice by embeddings of AdapterSoup's section 3, with the mixture as its one domain, as in
    LoraRetriever's section 5.1. Of fewer than ``k`` adapters all are taken.
    """

    name: str = "adaptersoup"
    k: int = 3

    @property
    def learns(self) -> bool:
        return True

    def prepare(self, ground: Ground) -> None:
        # Embedding the rows again takes less than a file of the choice would have to prove.
        ground.shared[self._key] = tuple(mean_cosines(ground, self.name))[: self.k]

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        chosen = ground.shared[self._key]
        assert isinstance(chosen, tuple), "prepare has put it there"
        return [Routing("fusion", adapters=chosen, namespace=ground.namespace)] * len(rows)

    @property
    def _key(self) -> str:
        return f"adaptersoup {self.k}"


def mean_cosines(ground: Ground, system: str) -> dict[str, float]:
    """Each adapter of the pool by its mean cosine with the training rows, the highest first, then by name.

    Raises:
        ConfigurationError: no training rows.
        NoAdaptersError: no adapters.
    """
    pool = ground.pool()
    if not pool:
        raise NoAdaptersError(f"system {system!r}: no adapters for {str(ground.base_model)!r} are in service")
    found = ground.hub.search_many(
        [row.inputs for row in ground.lessons(system).rows],
        len(pool),
        base_model=ground.base_model,
        namespace=ground.namespace,
        rerank=False,
    )
    sums = dict.fromkeys(sorted(pool), 0.0)
    for hits in found:
        for hit in hits:
            sums[hit.adapter.name] += hit.score
    return {name: sums[name] / len(found) for name in sorted(sums, key=lambda name: -sums[name])}
