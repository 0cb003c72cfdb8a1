"""Tasks as a retriever is trained and measured on them: a name, some prompts, perhaps a domain."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.retriever.samples import read_samples, sample_texts
from lora_hub_sdk.types import Adapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.retriever.encoder import Encoder

#: A tag of this form tells the domain of a registered adapter, as "domain:nli".
DOMAIN_TAG = "domain:"


@dataclass(frozen=True, slots=True)
class Task:
    """What one adapter is for: ``inputs`` are prompts of it, as ``sample_texts`` brings them to form.

    Tasks of one ``domain`` are alike: mistaking one for another is a smaller error. None where nobody told.
    """

    name: str
    inputs: tuple[str, ...]
    domain: str | None = None


class TaskSource(Protocol):
    """What tasks are read from: a ``LoraHub``, or anything that lists adapters and their samples."""

    def list(self) -> list[Adapter]:
        """Every adapter."""

    def samples(self, name: str, *, namespace: str) -> tuple[str, ...]:
        """The texts that were kept of one."""


def tasks_of(source: TaskSource, namespace: str | None = None) -> list[Task]:
    """The adapters in service whose samples were kept, each as a task named as the adapter is.

    Args:
        namespace: only this one's; by default all, and two of one name are one task.

    Raises:
        SamplesError: there are none.
    """
    found: dict[str, Task] = {}
    for adapter in source.list():
        if adapter.state != "active" or namespace not in (None, adapter.namespace) or adapter.name in found:
            continue
        if texts := source.samples(adapter.name, namespace=adapter.namespace):
            domain = next((tag.removeprefix(DOMAIN_TAG) for tag in adapter.tags if tag.startswith(DOMAIN_TAG)), None)
            found[adapter.name] = Task(adapter.name, texts, domain)
    if not found:
        raise SamplesError(
            namespace or "registry",
            "no adapter in service has samples that were kept; register some with samples=[...]",
        )
    return list(found.values())


def read_tasks(path: str | os.PathLike[str]) -> list[Task]:
    """Tasks from JSON lines of ``{"task", "inputs"}``, with or without a ``"domain"``; other fields are ignored.

    ``inputs`` is one text, or a list of texts. Lines of one task come together, in the order of first sight. Blank and
    repeated texts of a task are dropped.

    Raises:
        ConfigurationError: the file cannot be read, a line is not what it should be (told by its number, never by its
            content), a task has two domains, or there is no line.
        SamplesError: a task has no text at all.
    """
    texts: dict[str, list[str]] = {}
    domains: dict[str, str | None] = {}
    for number, row in enumerate(read_samples(path), start=1):
        name, inputs, domain = _parts(row, f"tasks {os.fspath(path)!r}, row {number}")
        texts.setdefault(name, []).extend(inputs)
        if domains.setdefault(name, domain) != domain:
            raise ConfigurationError(
                f"tasks {os.fspath(path)!r}, row {number}: task {name!r} is of domain {domain!r} here and of "
                f"{domains[name]!r} before"
            )
    if not texts:
        raise ConfigurationError(f'tasks {os.fspath(path)!r} hold no row; expected {{"task", "inputs"}} in each line')
    return [Task(name, sample_texts(found, name), domains[name]) for name, found in texts.items()]


def task_vectors(encoder: Encoder, tasks: Sequence[Task]) -> dict[str, NDArray[np.float32]]:
    """For each task's name the vectors of its inputs, (n, dimension), of length 1; all are encoded in one call."""
    encoded = encoder.encode([text for task in tasks for text in task.inputs])
    ends = np.cumsum([len(task.inputs) for task in tasks])[:-1]
    return {task.name: rows for task, rows in zip(tasks, np.split(encoded, ends), strict=True)}


def split_tasks(tasks: Sequence[Task], fraction: float, seed: int = 0) -> tuple[list[Task], list[Task]]:
    """Tasks to train on, drawn at random, and the others, which stay unseen; both in the order given.

    ``round(fraction * len(tasks))`` are drawn, at least two. The draw depends on the names and the seed alone.

    Raises:
        ConfigurationError: a fraction outside of (0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ConfigurationError(f"fraction={fraction!r}: expected a number above 0 and up to 1")
    names = sorted(task.name for task in tasks)
    count = min(len(names), max(2, round(fraction * len(names))))
    drawn = set(random.Random(seed).sample(names, count))
    return [task for task in tasks if task.name in drawn], [task for task in tasks if task.name not in drawn]


def _parts(row: object, place: str) -> tuple[str, list[str], str | None]:
    if not isinstance(row, Mapping):
        raise ConfigurationError(f'{place}: expected an object with "task" and "inputs", found a {type(row).__name__}')
    name, inputs, domain = row.get("task"), row.get("inputs"), row.get("domain")
    if not isinstance(name, str) or not name.strip():
        raise ConfigurationError(f'{place}: "task" names no task')
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping):
        raise ConfigurationError(f'{place}: "inputs" is neither a text nor a list of texts')
    listed = list(texts)
    if not all(isinstance(text, str) for text in listed):
        raise ConfigurationError(f'{place}: "inputs" is neither a text nor a list of texts')
    if domain is not None and not isinstance(domain, str):
        raise ConfigurationError(f'{place}: "domain" is no text')
    return name, listed, domain
