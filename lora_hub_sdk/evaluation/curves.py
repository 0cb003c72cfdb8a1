"""Quality against the number of adapters that take part (paper figure 4a), from the answers of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.intervals import Interval, Scores
from lora_hub_sdk.evaluation.systems import K

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.answers import Answer
    from lora_hub_sdk.retriever.figures import Curve

#: The strategies of the figure, each with the own adapter in the pool and without it.
FAMILIES: Final[tuple[str, ...]] = ("mixture", "fusion", "mixture-ood", "fusion-ood")
KS: Final[tuple[int, ...]] = tuple(range(1, 9))


def curve_systems(ks: Iterable[int] = KS) -> tuple[str, ...]:
    """Names of the systems that a run has to answer by for the figure to be drawn.

    Raises:
        ConfigurationError: a k below 1.
    """
    numbers = sorted(set(ks))
    if numbers and numbers[0] < 1:
        raise ConfigurationError(f"k={numbers[0]}: expected 1 or more")
    return tuple(f"{family}@{k}" for family in FAMILIES for k in numbers)


def quality_curves(answers: Sequence[Answer], *, seed: int = 0) -> list[Curve]:
    """Mean over tasks of the mean score, in percent, over k, with intervals of 95 %.

    Only questions count that all of the systems have answered, so the points of all curves stand for the same ones.
    A strategy of fewer than two different k has no curve. One of k=1 is selection, whatever it is called.
    """
    asked = {answer.system for answer in answers}
    found = {family: _systems_of(family, asked) for family in FAMILIES}
    curves = {family: systems for family, systems in found.items() if len(systems) > 1}
    if not curves:
        return []
    scores = common_scores(answers, {name for systems in curves.values() for name in systems.values()}, seed=seed)
    means = scores.means()
    return [
        interval_curve(_called(family), {k: means[name] for k, name in systems.items()})
        for family, systems in curves.items()
    ]


def common_scores(answers: Iterable[Answer], systems: Iterable[str], *, seed: int = 0) -> Scores:
    """Scores of some systems for the questions that all of them have a score for.

    Raises:
        ConfigurationError: there is no such question.
    """
    by_system: dict[str, dict[int, float]] = {name: {} for name in systems}
    tasks: dict[int, str] = {}
    for answer in answers:
        if answer.system in by_system and answer.score is not None:
            by_system[answer.system][answer.question] = answer.score
            tasks[answer.question] = answer.task
    shared = sorted(question for question in tasks if all(question in found for found in by_system.values()))
    if not shared:
        raise ConfigurationError(
            f"no question has a score of each of {', '.join(sorted(by_system))}; let the run come to its end"
        )
    rows = {name: [found[question] for question in shared] for name, found in by_system.items()}
    return Scores.of(rows, [tasks[question] for question in shared], seed=seed)


def interval_curve(name: str, points: Mapping[float, Interval] | Mapping[int, Interval]) -> Curve:
    """A curve through intervals; without a band where the bounds of any of them are not known."""
    from lora_hub_sdk.retriever.figures import Curve

    xs = sorted(points)
    found = [points[x] for x in xs]  # type: ignore[index]
    known = all(one.is_known for one in found)
    return Curve(
        name,
        list(xs),
        [one.value for one in found],
        [one.low for one in found] if known else None,
        [one.high for one in found] if known else None,
    )


def _systems_of(family: str, asked: set[str]) -> dict[int, str]:
    """By k the system that stands for it, in the order of k."""
    found = {int(k): name for name in asked for head, _, k in [name.partition("@")] if head == family and k.isdecimal()}
    if family in asked:
        found.setdefault(K, family)
    selection = "selection-ood" if family.endswith("-ood") else "selection"
    if selection in asked:
        found.setdefault(1, selection)
    return dict(sorted(found.items()))


def _called(family: str) -> str:
    return family.replace("-ood", ", own adapter left out")
