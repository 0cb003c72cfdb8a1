"""What every system of a benchmark answers: the same prompts, routes and adapters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from lora_hub_sdk.composition.strategies import get_strategy, route_from_hits
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.models import ResolvedModel
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
from lora_hub_sdk.registry.admission import ModuleShapes
from lora_hub_sdk.testing.tiny import ATTENTION, MLP, tiny_adapter, unregistered
from lora_hub_sdk.types import Adapter, Hit, Route

Tokens = list[tuple[int, ...]]
#: A random adapter changes the answers and leaves the model's numbers in their usual range.
_RANDOM_SCALE: Final = 0.25


class IdTokenizer:
    """A text is its token ids in decimal: all systems get exactly the same tokens, and theirs can be compared."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(token) for token in text.split()]}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


@dataclass(frozen=True)
class Workload:
    """b prompts; for each a route over k adapters, averaged either way, and one adapter by itself."""

    prompts: Tokens
    mixture: tuple[Route, ...]
    fusion: tuple[Route, ...]
    selection: tuple[Route, ...]

    @property
    def base(self) -> tuple[Route, ...]:
        return (Route("base", "outputs"),) * len(self.prompts)

    @property
    def chosen(self) -> list[Adapter]:
        """The one adapter of each row of ``selection``."""
        return [route.members[0].adapter for route in self.selection]


def load_endless(resolved: ResolvedModel, dtype: str) -> BaseModel:
    """The base model with no token that ends a text: every system decodes the same number of tokens."""
    from transformers import GenerationConfig

    config: Any = GenerationConfig  # untyped
    base = load_base_model(resolved, ModelSettings(dtype=cast(Any, dtype)))
    # What the checkpoint says about sampling and ends must not reach ``generate`` either.
    cast(Any, base.model).generation_config = config(do_sample=False, pad_token_id=base.pad_id)
    return replace(base, eos_ids=frozenset(), tokenizer=cast(Any, IdTokenizer()))


def random_adapters(folder: Path, base: ResolvedModel, count: int, rank: int) -> list[Path]:
    """Write ``count`` random LoRAs on all linear layers, in PEFT's format."""
    return [
        tiny_adapter(
            folder / f"random-{seed:02d}",
            base.folder,
            rank=rank,
            alpha=_RANDOM_SCALE * rank,
            seed=seed,
            modules=(*ATTENTION, *MLP),
        )
        for seed in range(count)
    ]


def read_adapters(folders: Sequence[Path], shapes: ModuleShapes) -> list[Adapter]:
    """Adapters as a registry would hold them, without one.

    Raises:
        AdmissionError: a folder holds no adapter of this base model.
    """
    return [unregistered(folder, shapes, id=place) for place, folder in enumerate(folders)]


def adapter_folders(parent: Path) -> list[Path]:
    """The folders in ``parent`` that hold an adapter."""
    return sorted(path.parent for path in parent.glob(f"*/{CONFIG_FILE}"))


def build_workload(
    adapters: Sequence[Adapter], *, batch: int, k: int, prompt_tokens: int, vocabulary: int, seed: int = 0
) -> Workload:
    """Random prompts of half to all of ``prompt_tokens``, so that padding takes part, and a random route for each."""
    draw = random.Random(seed)
    prompts: Tokens = []
    hits: list[list[Hit]] = []
    for row in range(batch):
        length = prompt_tokens - row * (prompt_tokens // 2) // max(batch - 1, 1)
        # Special tokens stand at the beginning of a vocabulary.
        prompts.append(tuple(draw.randrange(vocabulary // 10, vocabulary) for _ in range(length)))
        hits.append([Hit(adapter, 1.0) for adapter in draw.sample(list(adapters), k)])
    singles = [[Hit(adapters[row % len(adapters)], 1.0)] for row in range(batch)]
    return Workload(prompts, _routes("mixture", hits), _routes("fusion", hits), _routes("selection", singles))


def _routes(strategy: str, hits: Sequence[Sequence[Hit]]) -> tuple[Route, ...]:
    return tuple(route_from_hits(get_strategy(strategy), row) for row in hits)
