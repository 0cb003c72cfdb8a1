"""A pool with near-duplicates: how they crowd a route, and what that costs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.intervals import Interval, Scores
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.routed import STRATEGIES, RoutedSystem, prepare_strategies
from lora_hub_sdk.evaluation.run import run
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_hub_sdk.evaluation.answers import Answer
    from lora_hub_sdk.evaluation.ground import Ground

_ALONE: Final = " without copies"


@dataclass(frozen=True, slots=True)
class Crowding:
    """One system's answers to one group of questions.

    Attributes:
        quality: mean score over tasks, percent.
        crowded: share of the routes with two or more of one family, an original and its copies.
        family_weight: the weight of the heaviest family or single adapter in a route, mean.
        distinct: families and single adapters in a route, mean.
    """

    quality: Interval
    crowded: float
    family_weight: float
    distinct: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "quality": self.quality.as_dict(),
            "crowded": self.crowded,
            "family_weight": self.family_weight,
            "distinct": self.distinct,
        }


def study_duplicates(
    ground: Ground,
    questions: MixedSet,
    *,
    copies: Mapping[str, str],
    output: str | os.PathLike[str],
    strategies: Sequence[str] = tuple(STRATEGIES),
    k: int = 3,
) -> dict[str, dict[str, Crowding]]:
    """Ask by every strategy with the copies in the pool, and without them.

    "-ood" leaves out the own adapter by its name, as one would who knows nothing of its copies: what it gains over
    " without copies-ood" is what the copies give away.

    Args:
        copies: by name of a copy that of its original; ``near_duplicates`` finds them.
        output: folder of the run.

    Returns:
        By group of questions ("copied": the own adapter has copies; "others"), then by system.

    Raises:
        ConfigurationError: no copies, no question with an own adapter, or a strategy that is not of ``STRATEGIES``.
        SamplesError: "gate" has too few samples to learn from.
        As ``run``.
    """
    asked = questions.of([task for task in questions.tasks if task in ground.own])
    if not copies or not len(asked):
        raise ConfigurationError(
            f"{len(copies)} copies and {len(asked)} questions with an own adapter: expected one or more of each"
        )
    routings = prepare_strategies(ground, strategies, k)
    systems = [
        RoutedSystem(f"{name}{_ALONE * alone}{'-ood' * ood}", _rule(ground, routing, copies, ood, alone))
        for ood in (False, True)
        for name, routing in routings.items()
        for alone in (False, True)
    ]
    results = run(ground, asked, systems, output=output)
    originals = set(copies.values())
    groups: dict[str, dict[str, list[Answer]]] = {}
    for answer in results.answers:
        if answer.score is not None:
            group = "copied" if ground.own[answer.task] in originals else "others"
            groups.setdefault(group, {}).setdefault(answer.system, []).append(answer)
    return {
        group: {one.name: _crowding(found[one.name], copies, ground.seed) for one in systems if one.name in found}
        for group, found in sorted(groups.items())
    }


def _rule(
    ground: Ground, routing: Routing, copies: Mapping[str, str], ood: bool, alone: bool
) -> Callable[[MixedRow], Routing]:
    def of(row: MixedRow) -> Routing:
        left_out = ((ground.own[row.task],) if ood else ()) + (tuple(copies) if alone else ())
        return replace(routing, exclude=left_out)

    return of


def _crowding(answers: Sequence[Answer], copies: Mapping[str, str], seed: int) -> Crowding:
    scores = Scores.of({"all": [answer.score for answer in answers]}, [answer.task for answer in answers], seed=seed)
    crowded = weight = distinct = 0.0
    for answer in answers:
        members = answer.route["adapters"] if answer.route is not None else []
        families = Counter(copies.get(member["name"], member["name"]) for member in members)
        weights = Counter[str]()
        for member in members:
            weights[copies.get(member["name"], member["name"])] += member["weight"]  # type: ignore[assignment]
        crowded += max(families.values(), default=0) > 1
        weight += max(weights.values(), default=0.0)
        distinct += len(families)
    count = len(answers)
    return Crowding(scores.mean("all"), crowded / count, weight / count, distinct / count)
