"""What every system stands on in one run: the hub, the base model, whose adapter is whose, and rows to learn from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.mixed_set import MixedSet
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.prompt import Template
    from lora_hub_sdk.hub import LoraHub


@dataclass(frozen=True, kw_only=True)
class Ground:
    """One run's common ground.

    Attributes:
        hub: its adapters of ``namespace`` for ``base_model`` are the pool.
        own: by task the name of its own adapter; a task may have none.
        training: rows that systems may learn from, never those that are asked. Empty where nothing is learned.
        folder: where what was learned is kept; a second run finds it there.
        seed: of everything that is drawn.
        template, settings: as for ``hub.generate``.
        progress: show bars on standard error.
    """

    hub: LoraHub
    base_model: str | os.PathLike[str]
    own: Mapping[str, str]
    folder: Path
    training: MixedSet = field(default_factory=lambda: MixedSet(()))
    namespace: str = DEFAULT_NAMESPACE
    seed: int = 0
    template: Template = "auto"
    settings: ModelSettings | None = None
    progress: bool = False
    #: What systems found in this process and share, by a key of their own.
    shared: dict[str, object] = field(default_factory=dict, repr=False)

    def pool(self) -> dict[str, Adapter]:
        """The adapters in service for the base model, by name."""
        found = self.hub.list(namespace=self.namespace, base_model=self.base_model)
        return {adapter.name: adapter for adapter in found if adapter.state == "active"}

    def own_adapters(self, tasks: Iterable[str]) -> dict[str, Adapter]:
        """By task its own adapter; tasks without one are left out.

        Raises:
            ConfigurationError: one that is not in the pool. Nobody could mask it, or ask it.
        """
        pool = self.pool()
        names = {task: self.own[task] for task in sorted(set(tasks)) if task in self.own}
        for task, name in names.items():
            if name not in pool:
                raise ConfigurationError(
                    f"own: task {task!r} names adapter {name!r}, and none of that name is in service in namespace "
                    f"{self.namespace!r} for base model {str(self.base_model)!r}; register it, or leave the task out"
                )
        return {task: pool[name] for task, name in names.items()}

    @property
    def recipe(self) -> dict[str, Any]:
        """What a trainer of a gate has to know of the ground."""
        return {name: getattr(self, name) for name in ("seed", "template", "settings", "progress")}

    def lessons(self, system: str) -> MixedSet:
        """``training``, for a system of that name.

        Raises:
            ConfigurationError: there is none.
        """
        if not self.training.rows:
            raise ConfigurationError(f"system {system!r} learns, and there are no training rows; give some")
        return self.training
