"""No adapter ever changes the base: its weights are the same, bit by bit, after 500 loads of every variant."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.engine.adapter_file import Unverified, open_factors
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, Quantization, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.families import FAMILIES, tiny_family
from lora_hub_sdk.types import Adapter, Sampling
from tests.engine.test_families import VARIANTS
from tests.support import adapter_at, route_of

#: What a quantized base refuses, as its original weights are gone.
_NEEDS_ORIGINAL = ("pissa", "olora")


def digest(base: BaseModel) -> str:
    """sha256 over every parameter and buffer, those of quantized weights too."""
    found = hashlib.sha256()
    model: Any = base.model
    for name, tensor in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("name", "quantization", "loads"),
    [("llama", None, 500), ("gpt2", None, 60), ("qwen2", "8bit", 60), ("qwen2", "4bit", 60)],
)
def test_the_base_is_the_same_after_many_loads_of_every_variant(
    name: str, quantization: Quantization | None, loads: int, tmp_path: Path
) -> None:
    folder = tiny_family(tmp_path / name, name)
    variants = [one for one in VARIANTS if quantization is None or one not in _NEEDS_ORIGINAL]
    adapters = [
        adapter_at(tiny_adapter(tmp_path / one, folder, seed=len(one), **VARIANTS[one](FAMILIES[name])), folder, id=at)
        for at, one in enumerate(variants)
    ]
    base = load_base_model(resolve_model(folder), ModelSettings(quantization=quantization))
    before = digest(base)
    loaded: list[str] = []

    def load(adapter: Adapter) -> AdapterFactors | Unverified:
        loaded.append(adapter.name)
        return open_factors(adapter)

    engine = Engine(base, host_bytes=0, load=load)
    for place in itertools.count():
        first, second = adapters[place % len(adapters)], adapters[(place * 7 + 3) % len(adapters)]
        routes = [route_of("mixture", (first, 0.6), (second, 0.4)), route_of("fusion", (second, 1.0))]
        engine.generate([Request("some prompt", route, Sampling(2)) for route in routes])
        for adapter in (first, second):
            engine.forget(adapter.digest)
        if len(loaded) >= loads:
            break
    assert set(loaded) == set(variants)
    stats = engine.stats()
    engine.close()
    assert stats.splits == 0
    assert digest(base) == before
