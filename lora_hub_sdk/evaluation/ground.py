"""What every system stands on in one run: the hub, the base model, whose adapter is whose, and rows to learn from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hub_sdk.evaluation.mixed_set import MixedSet
from lora_hub_sdk.types import DEFAULT_NAMESPACE

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
    training: MixedSet = MixedSet(())
    namespace: str = DEFAULT_NAMESPACE
    seed: int = 0
    template: Template = "auto"
    settings: ModelSettings | None = None
    progress: bool = False
    #: What systems found in this process and share, by a key of their own.
    shared: dict[str, object] = field(default_factory=dict, repr=False)
