"""Copies that were changed a little are told from other adapters by their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.near_duplicates import near_duplicates, weight_cosines, write_noisy
from lora_hub_sdk.testing.tiny import raw_factors, tiny_adapter, unregistered
from lora_hub_sdk.types import Adapter


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> list[Adapter]:
    """Three of different ranks, scales and modules, and two copies of the first."""
    a = tiny_adapter(tmp_path / "a", base, seed=1)
    folders = [
        a,
        tiny_adapter(tmp_path / "b", base, seed=2, rank=2, modules=("v_proj", "up_proj"), rslora=True),
        tiny_adapter(tmp_path / "c", base, seed=3, modules=("down_proj",)),
        write_noisy(a, tmp_path / "a-1", share=0.01, seed=1),
        write_noisy(a, tmp_path / "a-10", share=0.1, seed=2),
    ]
    layout = module_layout(base)
    return [unregistered(folder, layout, id=place) for place, folder in enumerate(folders)]


def test_copies_with_noise_are_found_and_their_originals_named(adapters: list[Adapter]) -> None:
    found = near_duplicates(adapters)
    cosines = {(pair.first, pair.second): pair.cosine for pair in found}
    assert cosines.keys() == {("a", "a-1"), ("a", "a-10"), ("a-1", "a-10")}
    assert [pair.cosine for pair in found] == sorted(cosines.values(), reverse=True)
    assert cosines["a", "a-1"] == pytest.approx(1 / (1 + 0.01**2), abs=1e-4)
    assert cosines["a", "a-10"] == pytest.approx(1 / (1 + 0.1**2), abs=5e-3)
    assert near_duplicates(adapters, above=0.999) == found[:1]


def test_cosines_are_those_of_the_dense_products(adapters: list[Adapter]) -> None:
    dense = [
        {path: (s * b @ a).double().numpy() for path, (a, b, s) in raw_factors(adapter.folder).items()}
        for adapter in adapters
    ]
    inner = np.array([[sum((x[p] * y[p]).sum() for p in x.keys() & y.keys()) for y in dense] for x in dense])
    lengths = np.sqrt(np.diag(inner))
    assert np.allclose(weight_cosines(adapters), inner / np.outer(lengths, lengths), atol=1e-5)


def test_adapters_for_different_base_models_are_not_compared(adapters: list[Adapter]) -> None:
    with pytest.raises(ConfigurationError, match="one base model"):
        near_duplicates([adapters[0], replace(adapters[1], base_model="other")])
