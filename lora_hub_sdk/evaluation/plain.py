"""Which adapters can be weighed by anything: plain LoRAs of linear modules, whose A and B are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.types import Adapter


def why_not_plain(ground: Ground, adapter: Adapter) -> str | None:
    """Why a gate or a search over weights cannot have an adapter, or None. Each content is read once for a ground."""
    from lora_hub_sdk.engine.adapter_file import load_factors
    from lora_hub_sdk.engine.expert_pool import unfusable, unweighable
    from lora_hub_sdk.engine.fitting import Fitting

    key = f"plain {adapter.digest}"
    if key not in ground.shared:
        base = ground.hub.engine(ground.base_model, ground.settings).base
        factors = Fitting(base.modules, embedding=base.embedding).fit(load_factors(adapter))
        ground.shared[key] = unweighable(factors, base.shapes) or unfusable(factors)
    found = ground.shared[key]
    assert found is None or isinstance(found, str), "nobody else writes this key"
    return found
