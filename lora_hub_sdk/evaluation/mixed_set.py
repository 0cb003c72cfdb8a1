"""Questions of many tasks in one set, as the paper's mixed-task data: what is asked, what is wanted, of which task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MixedRow:
    """A question and the answer that is wanted. ``domain`` is the task's cluster, ``metric`` a name of ``METRICS``."""

    inputs: str
    targets: str
    task: str
    domain: str
    metric: str


@dataclass(frozen=True, slots=True)
class MixedSet:
    """Rows in the order in which they are asked."""

    rows: tuple[MixedRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of their names."""
        return tuple(sorted({row.task for row in self.rows}))

    @property
    def domains(self) -> dict[str, str]:
        """The domain of each task, in the order of ``tasks``."""
        found = {row.task: row.domain for row in self.rows}
        return {task: found[task] for task in self.tasks}

    def of(self, tasks: Sequence[str]) -> MixedSet:
        """The rows of some tasks."""
        wanted = set(tasks)
        return MixedSet(tuple(row for row in self.rows if row.task in wanted))
