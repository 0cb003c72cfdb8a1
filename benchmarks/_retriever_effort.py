"""How much is measured: everything, or a little of each part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """Repetitions and sizes.

    ``splits``: random 40 % of the paper's tasks that encoders are trained on; ``task_splits``: of the other tasks.
    ``fraction_splits``: of each other fraction. ``draws``: of samples, and of distractors. ``pool_sizes``: adapters in
    all. ``events``: arrivals and departures, with a check after every ``check_every``.
    """

    splits: int = 5
    task_splits: int = 2
    fraction_splits: int = 1
    draws: int = 5
    pool_sizes: tuple[int, ...] = (48, 100, 300, 1000, 3000, 10_000)
    pool_draws: int = 3
    events: int = 200
    check_every: int = 20


FULL = Effort()
QUICK = Effort(splits=1, task_splits=1, fraction_splits=1, draws=2, pool_sizes=(48, 100), pool_draws=1, events=20)
