"""Adapters' factors in memory, least recently used out first, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from lora_hub_sdk.composition.factors import AdapterFactors, factors_from_bytes
from lora_hub_sdk.errors import AdapterChangedError, AdmissionError
from lora_hub_sdk.registry.adapter_config import adapter_config_from_bytes, read_config_bytes
from lora_hub_sdk.registry.admission import content_digest, read_weights
from lora_hub_sdk.types import Adapter


def load_factors(adapter: Adapter) -> AdapterFactors:
    """Read an adapter from its folder, only if it still is what was registered.

    Raises:
        AdapterChangedError: the files are gone or have another digest.
    """
    try:
        weights = read_weights(adapter.folder, source=adapter.name)
        config_bytes = read_config_bytes(adapter.folder, adapter.name)
    except (OSError, AdmissionError) as error:
        raise AdapterChangedError(
            f"the files of adapter {adapter.name!r} are gone from {adapter.folder} ({error}); register it again"
        ) from error
    found = content_digest(config_bytes, weights)
    if found != adapter.digest:
        raise AdapterChangedError(
            f"adapter {adapter.name!r} was registered with digest {adapter.digest[:12]}, {adapter.folder} now holds "
            f"{found[:12]}; remove it and register it again"
        )
    return factors_from_bytes(weights, adapter_config_from_bytes(config_bytes, adapter.name), found)


class AdapterCache:
    """LRU by content digest. One batch may exceed the budget; what it leaves behind does not."""

    def __init__(self, budget_bytes: int, load: Callable[[Adapter], AdapterFactors] = load_factors) -> None:
        self._budget = budget_bytes
        self._load = load
        self._held: OrderedDict[str, AdapterFactors] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        return sum(factors.size_bytes for factors in self._held.values())

    def get(self, adapters: tuple[Adapter, ...]) -> list[AdapterFactors]:
        """The factors of all these adapters, loading what is missing."""
        found = []
        for adapter in adapters:
            factors = self._held.pop(adapter.digest, None) or self._load(adapter)
            self._held[adapter.digest] = factors
            found.append(factors)
        while self._held and self.size_bytes > self._budget:
            self._held.popitem(last=False)
        return found
