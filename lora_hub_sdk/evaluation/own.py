"""Which adapter is a task's own: one of its name, or one that is tagged with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Adapter

#: What a tag begins with that tells an adapter's task.
TAG: Final = "task:"


def own_by_name(tasks: Iterable[str], adapters: Iterable[Adapter]) -> dict[str, str]:
    """By task the adapter of that name, else the one with the tag "task:NAME"; tasks with neither are left out.

    Raises:
        ConfigurationError: several adapters are tagged with one task.
    """
    pool = list(adapters)
    names = {adapter.name for adapter in pool}
    found: dict[str, str] = {}
    for task in tasks:
        tagged = [adapter.name for adapter in pool if TAG + task in adapter.tags]
        if task in names:
            found[task] = task
        elif len(tagged) > 1:
            raise ConfigurationError(
                f"task {task!r}: adapters {', '.join(map(repr, tagged))} are all tagged with it; tell which one is its "
                "own, in a file for --own"
            )
        elif tagged:
            found[task] = tagged[0]
    return found


def read_own(file: str | os.PathLike[str]) -> dict[str, str]:
    """A JSON object of task and adapter.

    Raises:
        ConfigurationError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(Path(file).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"own adapters {os.fspath(file)!r} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ConfigurationError(f'own adapters {os.fspath(file)!r}: expected an object like {{"task": "adapter"}}')
    return found
