"""Two adapters of one task that answer the opposite of each other: what strategies make of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.intervals import Interval, Scores
from lora_hub_sdk.evaluation.metrics import score
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.routed import STRATEGIES, RoutedSystem, prepare_strategies
from lora_hub_sdk.evaluation.run import run
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_hub_sdk.evaluation.answers import Answer
    from lora_hub_sdk.evaluation.ground import Ground


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one system answered; shares in percent.

    Attributes:
        right, opposite: as the question wants it, and as its exchanged label would be; the rest is neither.
        neither: its share.
        first_weight, second_weight: of the two adapters in the routes, means.
    """

    right: Interval
    opposite: Interval
    neither: float
    first_weight: float
    second_weight: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "right": self.right.as_dict(),
            "opposite": self.opposite.as_dict(),
            "neither": self.neither,
            "first_weight": self.first_weight,
            "second_weight": self.second_weight,
        }


def study_conflict(
    ground: Ground,
    questions: MixedSet,
    *,
    first: str,
    second: str,
    exchanged: Mapping[str, str],
    output: str | os.PathLike[str],
    strategies: Sequence[str] = tuple(STRATEGIES),
    k: int = 3,
) -> dict[str, Outcome]:
    """Ask the questions of ``first``'s tasks by every strategy, with both adapters in the pool, and tell what came.

    The systems: each adapter alone; every strategy on the pool; the two alone, mixed and fused; and every strategy on
    the pool without the second one. A score that only good adapters have (``Routing.scores``), a tag of the reviewed
    ones (``tags``) and ``exclude`` all lead to that last pool; ``adapters=(first,)`` is the first one alone.

    Args:
        questions: those of tasks whose own adapter is ``first`` are asked, as far as their target can be exchanged.
        second: the adapter that was taught the exchanged labels.
        exchanged: by target the one that ``second`` was taught for it.
        output: folder of the run.

    Raises:
        ConfigurationError: there is no such question, or a strategy that is not of ``STRATEGIES``.
        SamplesError: "gate" has too few samples to learn from.
        AdapterNotFoundError: one of the two is not registered.
        As ``run``.
    """
    for name in (first, second):
        ground.hub.get(name, namespace=ground.namespace)
    rows = [row for row in questions.rows if ground.own.get(row.task) == first and row.targets in exchanged]
    if not rows:
        raise ConfigurationError(
            f"no question is of a task whose own adapter is {first!r} and has one of the targets "
            f"{', '.join(map(repr, exchanged))}; give Ground(own={{task: {first!r}}}) and questions of that task"
        )
    pooled = prepare_strategies(ground, strategies, k)
    both = Routing(adapters=(first, second))
    routings = {
        "first": Routing("selection", adapters=(first,)),
        "second": Routing("selection", adapters=(second,)),
        **pooled,
        "both mixed": both,
        "both fused": replace(both, strategy="fusion"),
        **{f"{name} without the second": replace(routing, exclude=(second,)) for name, routing in pooled.items()},
    }
    asked = MixedSet(tuple(rows))
    systems = [RoutedSystem(name, _always(routing)) for name, routing in routings.items()]
    results = run(ground, asked, systems, output=output)
    found: dict[str, list[Answer]] = {name: [] for name in routings}
    for answer in results.answers:
        if answer.system in found and answer.text is not None:
            found[answer.system].append(answer)
    return {
        name: _outcome(answers, asked, exchanged, (first, second), ground.seed)
        for name, answers in found.items()
        if answers
    }


def _always(routing: Routing) -> Callable[[MixedRow], Routing]:
    def of(_: MixedRow) -> Routing:
        return routing

    return of


def _outcome(
    answers: list[Answer], asked: MixedSet, exchanged: Mapping[str, str], pair: tuple[str, str], seed: int
) -> Outcome:
    right, opposite = [], []
    for answer in answers:
        row = asked.rows[answer.question]
        right.append(100.0 * (answer.score == 100))
        opposite.append(100.0 * (score(row.metric, answer.text or "", exchanged[row.targets]) == 100))
    tasks = [answer.task for answer in answers]
    means = Scores.of({"right": right, "opposite": opposite}, tasks, seed=seed).means()
    weights = [_weights(answer) for answer in answers]
    first, second = (sum(one.get(name, 0.0) for one in weights) / len(weights) for name in pair)
    neither = 100.0 - means["right"].value - means["opposite"].value
    return Outcome(means["right"], means["opposite"], neither, first, second)


def _weights(answer: Answer) -> dict[str, float]:
    return {} if answer.route is None else {one["name"]: one["weight"] for one in answer.route["adapters"]}
