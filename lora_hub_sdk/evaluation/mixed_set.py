"""Questions of many tasks in one set, as the paper's mixed-task data: what is asked, what is wanted, of which task."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.metrics import METRICS
from lora_hub_sdk.evaluation.mixed_files import hub_rows, local_rows
from lora_hub_sdk.retriever.samples import folded


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
    """Rows in the order in which they are asked. Every task has one domain and one metric.

    Raises:
        ConfigurationError: a task with two domains, or two metrics.
    """

    rows: tuple[MixedRow, ...]

    def __post_init__(self) -> None:
        found: dict[str, MixedRow] = {}
        for row in self.rows:
            first = found.setdefault(row.task, row)
            for what, one, other in (("domain", first.domain, row.domain), ("metric", first.metric, row.metric)):
                if one != other:
                    raise ConfigurationError(f"task {row.task!r} has two {what}s, {one!r} and {other!r}; give it one")

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

    @property
    def digest(self) -> str:
        """sha256 of all rows in their order, 64 hex digits."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(json.dumps(astuple(row)).encode() + b"\n")
        return found.hexdigest()

    def of(self, tasks: Sequence[str]) -> MixedSet:
        """The rows of some tasks."""
        wanted = set(tasks)
        return MixedSet(tuple(row for row in self.rows if row.task in wanted))

    def sample(self, per_task: int, seed: int = 0) -> MixedSet:
        """Up to ``per_task`` questions of each task, drawn at random, all in a random order.

        A question that stands in a task twice is drawn once. What is drawn is a matter of the seed and the task's rows,
        not of their order nor of other tasks, and a larger sample holds every smaller one of its seed.

        Raises:
            ConfigurationError: ``per_task`` below 1.
        """
        if per_task < 1:
            raise ConfigurationError(f"per_task={per_task}: expected 1 or more")
        by_task: dict[str, dict[str, MixedRow]] = {}
        for row in sorted(self.rows, key=astuple):
            by_task.setdefault(row.task, {}).setdefault(folded(row.inputs), row)
        lots = [sorted(rows.values(), key=lambda row: _lot(str(seed), row)) for rows in by_task.values()]
        drawn = [row for rows in lots for row in rows[:per_task]]
        return MixedSet(tuple(sorted(drawn, key=lambda row: _lot(f"{seed} order", row))))

    def without(self, other: MixedSet) -> MixedSet:
        """The rows whose question does not stand in another set; case and white space make no difference."""
        known = {folded(row.inputs) for row in other.rows}
        return MixedSet(tuple(row for row in self.rows if folded(row.inputs) not in known))


def read_mixed(
    source: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    domain: str | None = None,
    metric: str | None = None,
) -> MixedSet:
    """The questions of a file (JSON lines, JSON, Parquet), of all *.jsonl in a folder, or of all files of a glob.

    Args:
        columns: what the file calls a field, as ``{"inputs": "question"}``.
        task, domain, metric: those of all rows, where the file does not tell.

    Raises:
        ConfigurationError: nothing to read, or a row that cannot be used; told by file and number, never its content.
    """
    return MixedSet(_checked(local_rows(source), os.fspath(source), columns, task, domain, metric))


def load_mixed_hub(
    repo_id: str,
    *,
    split: str = "test",
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    domain: str | None = None,
    metric: str | None = None,
) -> MixedSet:
    """The questions of one split of a Hub dataset: of its files whose names tell the split. No code of it is run.

    Args:
        split: as it stands in the files' names, "test" in "data/test-00000-of-00001.parquet".
        columns, task, domain, metric: as for ``read_mixed``.
        cache_dir: where the files are kept; None is huggingface_hub's cache.

    Raises:
        SourceError: the dataset cannot be had.
        ConfigurationError: no file of that split, or a row that cannot be used.
        MissingExtraError: the files are Parquet, and pyarrow is not installed.
    """
    rows = hub_rows(repo_id, split, revision=revision, endpoint=endpoint, token=token, cache_dir=cache_dir)
    return MixedSet(_checked(rows, repo_id, columns, task, domain, metric))


def _checked(
    rows: Iterable[tuple[str, object]],
    source: str,
    columns: Mapping[str, str] | None,
    task: str | None,
    domain: str | None,
    metric: str | None,
) -> tuple[MixedRow, ...]:
    names = [field.name for field in fields(MixedRow)]
    unknown = sorted(set(columns or {}) - set(names))
    if unknown:
        raise ConfigurationError(f"columns: {unknown[0]!r} is no field of a question; those are {', '.join(names)}")
    given = {name: text for name, text in (("task", task), ("domain", domain), ("metric", metric)) if text is not None}
    found = tuple(_row(row, place, {name: name for name in names} | dict(columns or {}), given) for place, row in rows)
    if not found:
        raise ConfigurationError(f"questions {source!r} hold no row")
    return found


def _row(row: object, place: str, columns: Mapping[str, str], given: Mapping[str, str]) -> MixedRow:
    if not isinstance(row, Mapping):
        raise ConfigurationError(f"{place}: expected an object with {', '.join(columns)}, found a {type(row).__name__}")
    texts = {}
    for name, column in columns.items():
        value = given.get(name, row.get(column))
        if not isinstance(value, str):
            what = f"is a {type(value).__name__}, expected a text" if column in row else "is missing"
            raise ConfigurationError(f"{place}: {column!r} {what}; name another column, or give what all rows share")
        # An answer may have to be nothing, as where a text does not hold one.
        if name != "targets" and not value.strip():
            raise ConfigurationError(f"{place}: {column!r} is blank")
        texts[name] = value
    if texts["metric"] not in METRICS:
        raise ConfigurationError(f"{place}: its metric is none of {', '.join(METRICS)}")
    return MixedRow(**texts)


def _lot(seed: str, row: MixedRow) -> bytes:
    return hashlib.sha256(json.dumps([seed, row.task, row.inputs, row.targets]).encode()).digest()
