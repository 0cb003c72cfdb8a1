"""Which strategy to use, in words that say no more than their intervals do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lora_hub_sdk.evaluation.groups import BASE, PERFECT, SELECTION_UNSEEN
from lora_hub_sdk.evaluation.intervals import Interval, Scores

#: A system with answers to a smaller share of the questions is no candidate.
_MOST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """The best of some systems, and those that nothing was shown against.

    Attributes:
        best: the highest mean over the questions that all candidates have answers to; None where nobody is a candidate.
        mean: of it, over those questions.
        questions: how many these are.
        equals: the others whose paired ratio to it is not below 1 for sure, with that ratio; the fewest adapters a
            prompt first.
        worse: those that are, with their ratio.
        against: what it is held against: the own adapter alone, or the nearest of the other adapters.
        ratio: of the best to that, over the questions that both have answers to; NaN where it was not asked.
        gain: of the best over the base model, in points, likewise.
        adapters: how many adapters a prompt has, by system, on average.
        taught: those of the candidates that need rows of the tasks.
    """

    best: str | None
    mean: Interval
    questions: int
    equals: Mapping[str, Interval]
    worse: Mapping[str, Interval]
    against: str
    ratio: Interval
    gain: Interval
    adapters: Mapping[str, float]
    taught: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "best": self.best,
            "mean": self.mean.as_dict(),
            "questions": self.questions,
            "equals": {name: one.as_dict() for name, one in self.equals.items()},
            "worse": {name: one.as_dict() for name, one in self.worse.items()},
            "against": self.against,
            "ratio": self.ratio.as_dict(),
            "gain": self.gain.as_dict(),
            "adapters": dict(self.adapters),
            "taught": sorted(self.taught),
        }


@dataclass(frozen=True, slots=True)
class Recommendation:
    """For prompts of tasks that have an adapter, and for those of tasks that have none."""

    seen: Choice
    unseen: Choice

    def sentences(self) -> tuple[str, ...]:
        """The recommendation in words, a paragraph each."""
        return (
            _told(self.seen, "For tasks with an adapter of their own", "the own adapter alone (perfect selection)"),
            _told(self.unseen, "For tasks without one (the own adapter left out)", "the nearest other adapter alone"),
            "Intervals are of 95 % each, for the questions of these tasks and no others. The best was chosen by the "
            "same answers, so its lead over those near it is flattered.",
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it, the words among it."""
        return {"seen": self.seen.as_dict(), "unseen": self.unseen.as_dict(), "sentences": list(self.sentences())}


def recommend(
    scores: Scores,
    *,
    seen: Sequence[str],
    unseen: Sequence[str],
    known: Collection[str],
    adapters: Mapping[str, float],
    taught: Collection[str] = (),
) -> Recommendation:
    """Choose by the scores alone.

    Args:
        scores: of all systems, also of "base", "perfect" and "selection-ood", which the best are held against.
        seen: systems that may know the own adapter.
        unseen: systems that may not.
        known: tasks that have an adapter of their own; only these tell of the systems that may know it.
        adapters: how many adapters a prompt has, by system, on average.
        taught: systems that need rows of the tasks to learn from.
    """
    return Recommendation(
        _choice(scores.within(list(known)), seen, PERFECT, adapters, taught),
        _choice(scores, unseen, SELECTION_UNSEEN, adapters, taught),
    )


def _choice(
    scores: Scores, systems: Sequence[str], against: str, adapters: Mapping[str, float], taught: Collection[str]
) -> Choice:
    answered = {name: ~np.isnan(scores.values[scores.systems.index(name)]) for name in systems}
    names = [name for name, there in answered.items() if there.size and there.mean() > _MOST]
    nothing = Interval(math.nan)
    if not names:
        return Choice(None, nothing, 0, {}, {}, against, nothing, nothing, {})
    common = np.logical_and.reduce([answered[name] for name in names])
    shared = Scores(
        scores.values[:, common],
        scores.systems,
        tuple(task for task, there in zip(scores.tasks, common, strict=True) if there),
        scores.seed,
        scores.draws,
    )
    means = {name: shared.mean(name) for name in names}
    # Of equal means the one with fewer adapters, as a tie says nothing for more.
    best = max(names, key=lambda name: (_number(means[name].value), -adapters.get(name, 0.0)))
    ratios = {name: shared.ratio(name, best) for name in names if name != best}
    ranked = sorted(ratios, key=lambda name: (adapters.get(name, 0.0), -_number(means[name].value)))
    return Choice(
        best,
        means[best],
        int(common.sum()),
        {name: ratios[name] for name in ranked if not ratios[name].below(1)},
        {name: ratios[name] for name in ranked if ratios[name].below(1)},
        against,
        scores.ratio(best, against) if against in scores.systems and against != best else nothing,
        scores.difference(best, BASE) if BASE in scores.systems else nothing,
        {name: adapters[name] for name in names if name in adapters},
        frozenset(names).intersection(taught),
    )


def _told(choice: Choice, where: str, against: str) -> str:
    if choice.best is None:
        return f"{where}: no strategy has answers to most questions, so none is recommended."
    if math.isnan(choice.mean.value):
        return f"{where}: no question was answered by all of the strategies; nothing can be said."
    best = choice.best
    parts = [
        f"{where}: `{best}` has the highest mean, {interval_text(choice.mean)} over {choice.questions} questions"
        f"{_price(choice, best)}."
    ]
    if choice.equals:
        others = ", ".join(
            f"`{name}` ({interval_text(ratio, 3)} of it{_price(choice, name)})" for name, ratio in choice.equals.items()
        )
        parts.append(f"Not shown to be worse: {others}.")
        if not choice.worse:
            parts.append("These are too few questions to tell any of them apart.")
        cheap = min(choice.equals, key=lambda name: choice.adapters.get(name, math.inf))
        if choice.adapters.get(cheap, math.inf) < choice.adapters.get(best, 0.0) - 0.05:
            parts.append(f"The fewest adapters of these has `{cheap}`.")
    elif choice.worse:
        parts.append("Every other strategy that was asked is shown to be worse.")
    if choice.worse:
        worse = ", ".join(f"`{name}` ({interval_text(ratio, 3)})" for name, ratio in choice.worse.items())
        parts.append(f"Shown to be worse: {worse}.")
    parts += _held(choice, against)
    return " ".join(parts)


def _held(choice: Choice, against: str) -> list[str]:
    parts = []
    if not math.isnan(choice.ratio.value):
        parts.append(
            f"It reaches {interval_text(choice.ratio, 3)} of {against}: "
            f"{_side(choice.ratio, 1.0, 'more', 'less', 'not shown to differ')}."
        )
    if not math.isnan(choice.gain.value):
        parts.append(
            f"Over the base model it gains {interval_text(choice.gain)} points: "
            f"{_side(choice.gain, 0.0, 'it helps', 'it harms', 'not shown to help')}."
        )
    return parts


def _side(interval: Interval, bound: float, above: str, below: str, neither: str) -> str:
    if interval.above(bound):
        return above
    if interval.below(bound):
        return below
    unknown = math.isnan(interval.low) or math.isnan(interval.high)
    return f"{neither} (too few questions to tell)" if unknown else neither


def interval_text(interval: Interval, digits: int = 1) -> str:
    """As "45.2 [41.0, 49.1]"; a bound that is not known is a question mark, and without any there is a dash."""
    if math.isnan(interval.value):
        return "-"
    low, high = ("?" if math.isnan(bound) else f"{bound:.{digits}f}" for bound in (interval.low, interval.high))
    return f"{interval.value:.{digits}f} [{low}, {high}]"


def _price(choice: Choice, name: str) -> str:
    rows = ", taught by rows of the tasks" if name in choice.taught else ""
    return f", {choice.adapters[name]:.1f} adapters a prompt{rows}" if name in choice.adapters else rows


def _number(value: float) -> float:
    return -math.inf if math.isnan(value) else value
