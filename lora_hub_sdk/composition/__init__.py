"""HOW ADAPTERS COMBINE: strategies and the mapping matrix (pure), the paper's forms, one LoRA per row."""

from lora_hub_sdk.composition.mapping import build_plan
from lora_hub_sdk.composition.strategies import STRATEGIES, Strategy, get_strategy, route_from_hits

__all__ = ["STRATEGIES", "Strategy", "build_plan", "get_strategy", "route_from_hits"]
