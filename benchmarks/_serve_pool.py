"""What the faces are asked: stories about a dozen themes, each with an adapter of its own in one registry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks._workload import Sizes, random_adapters
from lora_hub_sdk import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
from lora_hub_sdk.types import Completion

#: Random adapters change what is told and not how long it is, so that every answer has all the tokens it may have.
THEMES: Final = (
    "a lighthouse",
    "two rival bakers",
    "the first train",
    "a lost violin",
    "an island of cats",
    "winter in a mine",
    "a chess machine",
    "the last orchard",
    "a river ferry",
    "an old observatory",
    "a school on wheels",
    "the paper kite",
)
_WAYS: Final = (
    "Write a long story about {}.",
    "Tell me at length a tale of {}.",
    "Begin a novel about {}.",
    "Invent a legend about {}.",
    "Describe a long day with {}.",
    "Write ten paragraphs on {}.",
)


def prompts(count: int) -> list[str]:
    """That many different ones, themes taking turns."""
    return [
        _WAYS[place // len(THEMES) % len(_WAYS)].format(f"{THEMES[place % len(THEMES)]}, part {place}")
        for place in range(count)
    ]


def fill(database: Path, folder: Path, base_model: str, sizes: Sizes) -> None:
    """Register an adapter for each theme, for the base model as it is called here."""
    base = resolve_model(base_model)
    adapters = random_adapters(folder, base.folder, len(THEMES), sizes.rank, dtype="bfloat16")
    with LoraHub(database, offline=True) as hub:
        for theme, adapter in zip(THEMES, adapters, strict=True):
            config = json.loads((adapter.folder / CONFIG_FILE).read_text("utf-8"))
            text = json.dumps({**config, "base_model_name_or_path": base.id})
            (adapter.folder / CONFIG_FILE).write_text(text, "utf-8")
            samples = [way.format(theme) for way in _WAYS]
            hub.register(adapter.folder, name=theme, base_model=base_model, samples=samples)


def tokens_of(completions: Sequence[Completion]) -> int:
    """Of all answers."""
    return sum(one.usage.completion_tokens for one in completions)


def options(dtype: str, base_model: str, sizes: Sizes) -> dict[str, Any]:
    """A face's fields."""
    return {"base_model": base_model, "dtype": dtype, "k": sizes.k, "max_new_tokens": sizes.new_tokens}
