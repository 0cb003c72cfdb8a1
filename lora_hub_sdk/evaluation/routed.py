"""A system of a study: a rule that names each question's routing, beside the table's own systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.retrieved import Retrieved
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow

#: The strategies that studies compare; the last is the mixture weighed as ``hub.fit_weights`` has found.
STRATEGIES: Final[Mapping[str, Routing]] = {
    "selection": Routing("selection"),
    "mixture": Routing("mixture"),
    "fusion": Routing("fusion"),
    "gate": Routing("mixture", weights="gate"),
}


@dataclass(frozen=True, slots=True)
class RoutedSystem:
    """``of`` gives a row's routing, or None where it has none; the ground adds its namespace."""

    name: str
    of: Callable[[MixedRow], Routing | None]

    @property
    def learns(self) -> bool:
        return False

    def prepare(self, ground: Ground) -> None:
        """Nothing: see ``prepare_strategies``."""

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        found = [self.of(row) for row in rows]
        return [None if one is None else replace(one, namespace=ground.namespace) for one in found]


def prepare_strategies(ground: Ground, names: Sequence[str], k: int) -> dict[str, Routing]:
    """The routings of these strategies for k adapters; where "gate" is one, its rule is in the hub afterwards.

    Raises:
        ConfigurationError: none, or one that is not of ``STRATEGIES``.
        As ``hub.fit_weights``.
    """
    if not names or isinstance(names, str) or not {*names} <= {*STRATEGIES}:
        raise ConfigurationError(f"strategies={names!r}: expected one or more of {', '.join(STRATEGIES)}")
    if "gate" in names:
        Retrieved("gate", "mixture", weights="gate").prepare(ground)
    return {name: replace(STRATEGIES[name], k=k) for name in names}
