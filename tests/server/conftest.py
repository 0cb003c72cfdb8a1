"""One hub with three adapters, and one server over it, for all tests that change neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from tests.encoders import Hashing
from tests.server.serving import Served, serving

SAMPLES: Final = {
    "french": ["Translate into French: good morning", "How do you say thanks in French?"],
    "maths": ["What is 12 + 30?", "Add 4 and 9."],
    "poems": ["Write a poem about the sea", "Compose a short rhyme"],
}


def fill(hub: LoraHub, base: Path, folder: Path, **options: Any) -> None:
    """Register the three."""
    for seed, (name, samples) in enumerate(SAMPLES.items()):
        hub.register(tiny_adapter(folder / name, base, seed=seed, rank=seed + 2), samples=samples, **options)


@pytest.fixture(scope="package")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a chat template."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny-chat", chat=True, context=4096)


@pytest.fixture(scope="package")
def filled(tmp_path_factory: pytest.TempPathFactory, chat_base: Path) -> Iterator[LoraHub]:
    """A hub with the three adapters; whoever changes it has to open another."""
    folder = tmp_path_factory.mktemp("filled")
    with LoraHub(folder / "hub.db", encoder=Hashing("one"), offline=True, cache_dir=folder / "cache") as hub:
        fill(hub, chat_base, folder)
        yield hub


@pytest.fixture(scope="package")
def served(filled: LoraHub, chat_base: Path) -> Iterator[Served]:
    """A server over it, open to everybody on this machine."""
    with serving(filled, base_model=str(chat_base), max_body_bytes=1 << 20) as served:
        yield served
