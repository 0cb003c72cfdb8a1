"""A system: how each question of a mixed set is routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow
    from lora_hub_sdk.types import Routing


class System(Protocol):
    """One column of the table. Everything it does is said by routings, so that all systems share the batched engine."""

    @property
    def name(self) -> str:
        """As it is asked for and reported, as "mixture-ood@5"."""
        ...

    @property
    def learns(self) -> bool:
        """Whether ``prepare`` needs ``ground.training``."""
        ...

    def prepare(self, ground: Ground) -> None:
        """Learn what has to be learned, or read it where ``ground.folder`` has it; gates are put to use in the hub.

        Raises:
            ConfigurationError, SamplesError: there is nothing to learn from, or too few adapters.
            MissingExtraError: it needs packages that are not installed.
        """
        ...

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        """One for each row; None for a row that this system has no answer to, as a task without an own adapter.

        Called after ``prepare``. The same rows give the same routings.

        Raises:
            ConfigurationError: a task's own adapter is not in the pool, or nothing is left to search.
        """
        ...
