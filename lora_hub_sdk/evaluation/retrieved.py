"""The systems that learn nothing but weights: the base model, each task's own adapter, and what a search finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.weighting import LEARNED
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow


@dataclass(frozen=True, slots=True)
class Base:
    """The base model alone."""

    name: str = "base"

    @property
    def learns(self) -> bool:
        return False

    def prepare(self, ground: Ground) -> None:
        """There is nothing to learn."""

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        return [Routing("base", namespace=ground.namespace)] * len(rows)


@dataclass(frozen=True, slots=True)
class Perfect:
    """Each task's own adapter (paper section 5.1, "perfect selection"); None for a task that has none."""

    name: str = "perfect"

    @property
    def learns(self) -> bool:
        return False

    def prepare(self, ground: Ground) -> None:
        """There is nothing to learn."""

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        own = ground.own_adapters(row.task for row in rows)
        pinned = {
            task: Routing("selection", adapters=(adapter.name,), namespace=ground.namespace)
            for task, adapter in own.items()
        }
        return [pinned.get(row.task) for row in rows]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What is nearest to each prompt, composed by ``strategy`` (paper sections 4.1 and 4.2).

    Attributes:
        weights: as in ``Routing``; for learned ones ``prepare`` runs ``hub.fit_weights`` where nobody did, which goes
            by the samples that the registry kept.
        ood: see ``masked``.
    """

    name: str
    strategy: str
    k: int = 3
    weights: str = "uniform"
    ood: bool = False

    @property
    def learns(self) -> bool:
        return False

    def prepare(self, ground: Ground) -> None:
        if self.weights in LEARNED and ground.hub.weight_rule(ground.namespace) is None:
            ground.hub.fit_weights(namespace=ground.namespace, seed=ground.seed)

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        routing = Routing(self.strategy, k=self.k, weights=self.weights, namespace=ground.namespace)
        return [*masked(ground, rows, routing)] if self.ood else [routing] * len(rows)


def masked(ground: Ground, rows: Sequence[MixedRow], routing: Routing) -> list[Routing]:
    """``routing`` for each row, with its task's own adapter left out of the search (paper section 5, "OOD").

    An adapter is left out under all names that its content has. For a row whose task has no own adapter nothing is: it
    is out of distribution as it is.

    Raises:
        ConfigurationError: an own adapter that is not in the pool, or one that is all of the pool.
    """
    pool = ground.pool()
    by_task = {}
    for task, own in ground.own_adapters(row.task for row in rows).items():
        names = tuple(name for name, adapter in pool.items() if adapter.digest == own.digest)
        if len(names) == len(pool):
            raise ConfigurationError(
                f"out of distribution, task {task!r} is answered without its own adapter {own.name!r}, and the pool "
                "has no other; register more adapters, or leave such systems out"
            )
        by_task[task] = replace(routing, exclude=names)
    return [by_task.get(row.task, routing) for row in rows]
