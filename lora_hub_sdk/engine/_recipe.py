"""What every training of a gate is set by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.prompt import Template


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Attributes:
    seed: of everything that is drawn. On a CPU the same seed gives the same gate, with one version of torch and one
        number of threads.
    steps: how many.
    batch: rows a step.
    learning_rate: the highest; it rises over the first tenth of the steps and falls to zero.
    max_tokens: what is read of a prompt, its last tokens.
    answer_tokens: what is read of an answer.
    validation: the share of the rows that is held out to measure by.
    validation_rows: how many these are in all, at most.
    check_every: steps from one checkpoint, and measurement, to the next.
    template: see ``engine.prompt.Template``.
    settings: how the base model is loaded.
    progress: show a bar on standard error.

    Raises:
        ConfigurationError: a value that makes no sense.
    """

    seed: int = 0
    steps: int = 200
    batch: int = 8
    learning_rate: float = 3e-3
    max_tokens: int = 256
    answer_tokens: int = 64
    validation: float = 0.1
    validation_rows: int = 64
    check_every: int = 50
    template: Template = "auto"
    settings: ModelSettings | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        whole = "steps batch max_tokens answer_tokens validation_rows check_every"
        self._check(whole, "a whole number of 1 or more", lambda value: value >= 1, int)
        self._check("seed", "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32, int)
        self._check("learning_rate", "a number above 0", lambda value: value > 0)
        self._check("validation", "a number from 0 to below 1", lambda value: 0 <= value < 1)

    def _check(self, names: str, expected: str, fits: Callable[[Any], bool], kind: type = float) -> None:
        for name in names.split():
            value: Any = getattr(self, name)
            number = not isinstance(value, bool) and isinstance(value, kind | int)
            if not number or not (-math.inf < value < math.inf and fits(value)):
                raise ConfigurationError(f"{name}={value!r}: expected {expected}")

    def told(self) -> dict[str, Any]:
        """Everything in here that the weights depend on, as JSON can hold it."""
        recipe = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "progress"}
        recipe["template"] = self.template if isinstance(self.template, str | None) else "a function"
        recipe["settings"] = None if self.settings is None else asdict(self.settings)
        return recipe
