"""How sure a mean, a ratio or a difference of systems is: questions drawn again within their tasks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: How often the questions are drawn again, and the share of the draws that lies between the bounds.
DRAWS: Final = 2000
LEVEL: Final = 0.95
#: What sums of the same numbers in another order may differ by.
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the bounds that 95 % of the draws lie between.

    ``value`` is NaN where there is nothing to take it from, or a ratio to zero. The bounds are NaN where drawing again
    cannot tell: one question a task, or the same outcome in every draw, as when all answers are right. That is no
    certainty.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def is_known(self) -> bool:
        """Whether there are both bounds."""
        return not math.isnan(self.low) and not math.isnan(self.high)

    def above(self, bound: float) -> bool:
        """Whether all of it lies above; False where the lower bound is not known."""
        return self.low > bound

    def below(self, bound: float) -> bool:
        """Whether all of it lies below; False where the upper bound is not known."""
        return self.high < bound

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN: None stands for it."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(number) else number for name, number in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Every system's score for every question, and what can be said of them.

    A mean is the mean over tasks of the tasks' means, so that a task with many questions counts once. Tasks are given,
    questions are drawn: each draw takes as many questions of each task as it has, with replacement. All systems meet
    the same draws, so ratios and differences are paired. A task of a single question adds no width.

    Attributes:
        values: (systems, questions) in percent; NaN where a system has no answer.
        systems: names of the rows.
        tasks: of each question its task.
        seed: of the draws.
    """

    values: NDArray[np.float64]
    systems: tuple[str, ...]
    tasks: tuple[str, ...]
    seed: int = 0
    draws: int = DRAWS

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.systems), len(self.tasks)):
            raise ConfigurationError(
                f"scores of shape {self.values.shape}: expected ({len(self.systems)}, {len(self.tasks)}), a row for "
                "each system and a column for each question's task"
            )

    @classmethod
    def of(cls, scores: Mapping[str, Sequence[float | None]], tasks: Sequence[str], *, seed: int = 0) -> Self:
        """Of each system's scores, one for each question, None or NaN where it has no answer.

        Raises:
            ConfigurationError: a system does not have as many scores as there are questions.
        """
        for name, row in scores.items():
            if len(row) != len(tasks):
                raise ConfigurationError(f"system {name!r} has {len(row)} scores for {len(tasks)} questions")
        rows = [[math.nan if value is None else value for value in row] for row in scores.values()]
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(tasks))
        return cls(values, tuple(scores), tuple(tasks), seed)

    def within(self, tasks: Sequence[str]) -> Self:
        """The questions of some tasks, as those of a cluster. Their draws stay the same."""
        wanted = set(tasks)
        places = [place for place, task in enumerate(self.tasks) if task in wanted]
        kept = tuple(self.tasks[place] for place in places)
        return type(self)(self.values[:, places], self.systems, kept, self.seed, self.draws)

    def mean(self, system: str) -> Interval:
        """Over the questions that the system has an answer to."""
        row = self._row(system)
        return self._interval(*self._means(row[None], ~np.isnan(row)), lambda means: means[0])

    def means(self) -> dict[str, Interval]:
        """Of every system."""
        return {system: self.mean(system) for system in self.systems}

    def difference(self, system: str, other: str) -> Interval:
        """``system`` less ``other``, over the questions that both have an answer to, in points."""
        return self._interval(*self._pair(system, other), lambda means: means[0] - means[1])

    def ratio(self, system: str, other: str) -> Interval:
        """``system``'s mean by ``other``'s, over the questions that both have an answer to.

        A draw in which both are 0 counts as 0 for the lower bound and as endless for the upper one.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self._interval(*self._pair(system, other), lambda means: means[0] / means[1])

    def _pair(self, system: str, other: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        pair = np.stack([self._row(system), self._row(other)])
        return self._means(pair, ~np.isnan(pair[0]) & ~np.isnan(pair[1]))

    def _row(self, system: str) -> NDArray[np.float64]:
        try:
            row: NDArray[np.float64] = self.values[self.systems.index(system)]
        except ValueError:
            raise ConfigurationError(f"no scores of system {system!r}; there are {', '.join(self.systems)}") from None
        return row

    def _means(
        self, rows: NDArray[np.float64], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each row the mean, (rows,), and the means of all draws, (rows, draws); of no questions NaN."""
        found = [(rows[:, places], self._drawn(task, len(places))) for task, places in self._by_task(valid)]
        if not found:
            return np.full(len(rows), np.nan), np.full((len(rows), self.draws), np.nan)
        value = np.mean([part.mean(axis=1) for part, _ in found], axis=0)
        # A column at a time: all draws of all questions at once would be large.
        drawn = np.mean([[row[places].mean(axis=1) for row in part] for part, places in found], axis=0)
        return value, drawn

    def _by_task(self, valid: NDArray[np.bool_]) -> Iterator[tuple[str, list[int]]]:
        places: dict[str, list[int]] = {}
        for place in np.flatnonzero(valid):
            places.setdefault(self.tasks[place], []).append(int(place))
        return iter(sorted(places.items()))

    def _drawn(self, task: str, count: int) -> NDArray[np.int64]:
        """(draws, count) of places below ``count``; a matter of the seed and the task, not of what stands beside it."""
        key = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
        return np.random.default_rng([self.seed, key, count]).integers(0, count, (self.draws, count))

    def _interval(
        self,
        means: NDArray[np.float64],
        drawn: NDArray[np.float64],
        of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    ) -> Interval:
        value, outcomes = float(of(means)), of(drawn)
        if not math.isfinite(value):
            return Interval(math.nan)
        if np.ptp(outcomes) <= _ROUNDING * max(1.0, abs(value)):
            return Interval(value)
        tail = (1 - LEVEL) / 2
        undefined = np.isnan(outcomes)
        # No interpolation: there may be endless ratios among them.
        low = float(np.quantile(np.where(undefined, 0.0, outcomes), tail, method="inverted_cdf"))
        high = float(np.quantile(np.where(undefined, np.inf, outcomes), 1 - tail, method="inverted_cdf"))
        return Interval(value, low, high if math.isfinite(high) else math.nan)
