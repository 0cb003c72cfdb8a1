"""The LoRA configuration and the length of training of each demo task.

The shapes differ on purpose: a registry of equal adapters would never exercise the mixing of unlike ranks,
scalings, modules and layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig

BASE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_LAYERS = 30

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """A LoRA shape and how many optimiser steps of 8 rows it is trained for."""

    rank: int
    alpha: int
    modules: tuple[str, ...]
    steps: int
    learning_rate: float = 1.5e-3
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    last_layers: int | None = None

    def lora_config(self) -> LoraConfig:
        """Return the PEFT configuration; ``last_layers`` becomes ``layers_to_transform``."""
        from peft import LoraConfig

        layers = None if self.last_layers is None else list(range(BASE_LAYERS - self.last_layers, BASE_LAYERS))
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.modules),
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            layers_to_transform=layers,
        )


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "sentiment": Recipe(rank=4, alpha=8, modules=("q_proj", "v_proj"), steps=90),
        "package-section": Recipe(rank=6, alpha=12, modules=_ATTENTION, steps=100),
        "translate-it": Recipe(rank=3, alpha=6, modules=(*_ATTENTION, *_MLP), steps=150),
        "number-words-fr": Recipe(rank=5, alpha=10, modules=_MLP, steps=450),
        "date-iso": Recipe(rank=2, alpha=8, modules=(*_ATTENTION, *_MLP), steps=130),
        "contact-json": Recipe(rank=16, alpha=16, modules=("q_proj", "v_proj"), use_rslora=True, steps=75),
        "text-to-sql": Recipe(
            rank=8,
            alpha=16,
            modules=("q_proj", "v_proj", "up_proj", "down_proj"),
            rank_pattern={"up_proj": 3, "down_proj": 3},
            alpha_pattern={"up_proj": 9, "down_proj": 9},
            steps=70,
        ),
        "word-category": Recipe(rank=10, alpha=10, modules=("q_proj", "k_proj", "v_proj"), use_rslora=True, steps=100),
        "language-id": Recipe(rank=8, alpha=32, modules=_ATTENTION, steps=90, last_layers=20),
        "identifier-case": Recipe(rank=7, alpha=14, modules=("v_proj", "down_proj"), steps=100),
    }
)
