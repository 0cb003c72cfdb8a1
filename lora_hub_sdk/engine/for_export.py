"""A loaded base model as an export sees it: adapters are fitted to it, and its weights can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.base_weights import is_transposed, stored_weight
from lora_hub_sdk.engine.fitting import Fitting

if TYPE_CHECKING:
    from torch import Tensor


class BaseForExport:
    """Implements ``composition.export.Base``."""

    def __init__(self, base: BaseModel) -> None:
        self._modules = base.modules
        self._fitting = Fitting(base.modules, embedding=base.embedding)

    def fit(self, factors: AdapterFactors) -> AdapterFactors:
        """As ``Fitting.fit``."""
        return self._fitting.fit(factors)

    def weight(self, path: str) -> Tensor:
        """W of a linear module or of the embedding, (d_out, d_in), on the CPU."""
        module = self._modules[path]
        weight = stored_weight(module).cpu()
        return weight.t() if is_transposed(module) else weight
