"""Adapters' factors in memory, least recently used out first, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.engine.adapter_file import load_factors as load_factors
from lora_hub_sdk.types import Adapter


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
