"""LoRAuter (arXiv 2601.21795): a prompt finds the nearest tasks, and each names the adapter that does best at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_hub_sdk.composition.weighting import similarity
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.task_ranking import TaskRanking
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow
    from lora_hub_sdk.evaluation.system import System

#: Rows that each task is known by and measured with.
ROWS: Final = 20
_SHARED: Final = "lorauter"


@dataclass(frozen=True, slots=True)
class Lorauter:
    """The best adapters of the ``k`` tasks nearest to a prompt, mixed by softmax of the cosines at temperature 0.2.

    A task's vector is the mean of its training rows' embeddings (up to 20 of them, drawn by the ground's seed). Its
    best adapter is found by successive halving, as ``TaskRanking`` tells. Nothing is asked of who trained the adapters.
    The measured scores are kept in the registry, so a second ``prepare`` asks only what is new. An adapter that several
    tasks name has the sum of their weights.

    Attributes:
        ood: leave out the task of the question, and its own adapter wherever another task names it: that task then
            names the next best one.
    """

    name: str = "lorauter"
    k: int = 3
    ood: bool = False

    @property
    def learns(self) -> bool:
        return True

    def prepare(self, ground: Ground) -> None:
        lessons = ground.lessons(self.name).sample(ROWS, ground.seed)
        rows = {task: lessons.of([task]).rows for task in lessons.tasks}
        encoded = ground.hub.encoder.encode([row.inputs for row in lessons.rows])
        places = {task: [place for place, row in enumerate(lessons.rows) if row.task == task] for task in rows}
        centres = np.stack([encoded[places[task]].mean(axis=0) for task in rows])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        ground.shared[_SHARED] = _Map(tuple(rows), centres, TaskRanking(ground, self.name).of(rows))

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        known = ground.shared[_SHARED]
        assert isinstance(known, _Map), "prepare has put it there"
        pool, masked = ground.pool(), dict[str, frozenset[str]]()
        if self.ood:
            own = ground.own_adapters(row.task for row in rows)
            masked = {
                task: frozenset(name for name, one in pool.items() if one.digest == adapter.digest)
                for task, adapter in own.items()
            }
        cosines = ground.hub.encoder.encode([row.inputs for row in rows]) @ known.centres.T
        return [
            self._routing(ground, known, row, near, masked.get(row.task, frozenset()))
            for row, near in zip(rows, cosines, strict=True)
        ]

    def _routing(
        self, ground: Ground, known: _Map, row: MixedRow, cosines: NDArray[np.float32], masked: frozenset[str]
    ) -> Routing:
        best = {
            place: next((name for name in known.rankings[task] if name not in masked), "")
            for place, task in enumerate(known.tasks)
            if not (self.ood and task == row.task)
        }
        if not best or "" in best.values():
            raise ConfigurationError(
                f"out of distribution, task {row.task!r} is answered without its own rows and adapter, and there are "
                "no others; give training rows of more tasks and register more adapters, or leave such systems out"
            )
        nearest = sorted(best, key=lambda place: -cosines[place])[: self.k]
        weights: dict[str, float] = {}
        for place, weight in zip(nearest, similarity([float(cosines[place]) for place in nearest]), strict=True):
            weights[best[place]] = weights.get(best[place], 0.0) + weight
        # One adapter alone is that adapter, whatever the sum's last digit.
        given = tuple(weights.values()) if len(weights) > 1 else (1.0,)
        return Routing("mixture", adapters=tuple(weights), adapter_weights=given, namespace=ground.namespace)


@dataclass(frozen=True, slots=True)
class _Map:
    """The tasks with their vectors, (tasks, dimension), each of length 1, and their adapters, the best first."""

    tasks: tuple[str, ...]
    centres: NDArray[np.float32]
    rankings: dict[str, tuple[str, ...]]


def lorauter_system(name: str, k: int = 3, ood: bool = False) -> System:
    """The system of the catalogue."""
    return Lorauter(name, k, ood)
