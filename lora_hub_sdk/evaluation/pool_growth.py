"""What becomes of quality as a pool grows: the same questions, with ever more adapters to choose from."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.curves import common_scores, interval_curve
from lora_hub_sdk.evaluation.intervals import Interval
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.retrieved import Perfect
from lora_hub_sdk.evaluation.routed import STRATEGIES, RoutedSystem, prepare_strategies
from lora_hub_sdk.evaluation.run import run
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.system import System
    from lora_hub_sdk.retriever.figures import Curve

SIZES: Final = (4, 8, 16, 28)
_OOD: Final = "-ood"


@dataclass(frozen=True, slots=True)
class PoolGrowth:
    """Mean scores by pool size, over the questions that have an own adapter.

    Attributes:
        questions: how many.
        perfect: the own adapter alone.
        quality: by strategy and size; "mixture-ood" is the mixture of a pool without the own adapter.
        own_first: by size the share of questions whose own adapter is the nearest.
    """

    questions: int
    perfect: Interval
    quality: Mapping[str, Mapping[int, Interval]]
    own_first: Mapping[int, float]

    @property
    def curves(self) -> list[Curve]:
        """For ``retriever.figures.curve_figure``."""
        return [interval_curve(name, points) for name, points in self.quality.items()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "perfect": self.perfect.as_dict(),
            "quality": {
                name: {str(size): one.as_dict() for size, one in points.items()}
                for name, points in self.quality.items()
            },
            "own_first": {str(size): share for size, share in self.own_first.items()},
        }


@dataclass(frozen=True, slots=True)
class SubPools:
    """Pools of any size for each task, drawn by the seed; a larger one holds the smaller ones.

    Attributes:
        names: the whole pool.
    """

    names: tuple[str, ...]
    own: Mapping[str, str]
    seed: int = 0

    def of(self, task: str, size: int, *, ood: bool = False) -> tuple[str, ...]:
        """``size`` adapters, or as many as there are: the task's own one first, or, where ``ood``, without it."""
        own = self.own[task]
        others = [name for name in sorted(self.names) if name != own]
        drawn = random.Random(f"{self.seed} {task}").sample(others, len(others))
        return tuple(drawn[:size] if ood else [own, *drawn[: size - 1]])

    def without(self, task: str, size: int, *, ood: bool = False) -> tuple[str, ...]:
        """All others, for ``Routing.exclude``."""
        kept = set(self.of(task, size, ood=ood))
        return tuple(name for name in sorted(self.names) if name not in kept)


def grow_pool(
    ground: Ground,
    questions: MixedSet,
    *,
    output: str | os.PathLike[str],
    sizes: Sequence[int] = SIZES,
    strategies: Sequence[str] = tuple(STRATEGIES),
    k: int = 3,
) -> PoolGrowth:
    """Answer questions from sub-pools of each size, with and without the own adapter in them.

    A task's sub-pools are drawn by ``ground.seed``. Weights of "gate" are those fitted to the whole pool. A size above
    the pool's is the whole pool.

    Args:
        questions: those of a task without an own adapter in the pool are left out.
        output: folder of the run, which goes on where it was stopped.

    Raises:
        ConfigurationError: no question is left, a strategy that is not of ``STRATEGIES``, or a size below 1.
        SamplesError: "gate" has too few samples to learn from.
        As ``run``.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigurationError(f"sizes={list(sizes)!r}: expected one or more, each of 1 or more adapters")
    routings = prepare_strategies(ground, strategies, k)
    names = tuple(ground.pool())
    asked = questions.of([task for task in questions.tasks if ground.own.get(task) in names])
    pools = SubPools(names, ground.own, ground.seed)
    most = {False: len(names), True: len(names) - 1}
    wanted = {ood: sorted({min(size, most[ood]) for size in sizes if most[ood]}) for ood in (False, True)}
    systems = {
        (strategy + _OOD * ood, size): _system(pools, strategy, routing, size, ood)
        for strategy, routing in routings.items()
        for ood in (False, True)
        for size in wanted[ood]
    }
    first = {size: _system(pools, "selection", STRATEGIES["selection"], size, False) for size in wanted[False]}
    all_systems: list[System] = [Perfect(), *first.values(), *systems.values()]
    results = run(ground, asked, all_systems, output=output)
    means = common_scores(results.answers, [one.name for one in all_systems], seed=ground.seed).means()
    quality: dict[str, dict[int, Interval]] = {}
    for (strategy, size), one in systems.items():
        quality.setdefault(strategy, {})[size] = means[one.name]
    nearest: dict[str, list[bool]] = {}
    for answer in results.answers:
        if answer.route is not None and answer.route["adapters"]:
            own = answer.route["adapters"][0]["name"] == ground.own[answer.task]
            nearest.setdefault(answer.system, []).append(own)
    shares = {size: sum(nearest[one.name]) / len(nearest[one.name]) for size, one in first.items()}
    return PoolGrowth(len(asked), means[Perfect().name], quality, shares)


def _system(pools: SubPools, strategy: str, routing: Routing, size: int, ood: bool) -> RoutedSystem:
    def of(row: MixedRow) -> Routing:
        return replace(routing, exclude=pools.without(row.task, size, ood=ood))

    return RoutedSystem(f"{strategy}#{size}{_OOD * ood}", of)
