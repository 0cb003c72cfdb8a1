"""Arrow's directions against the singular vectors of the dense products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hub_sdk.composition.arrow import arrow_directions
from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.testing import raw_factors, tiny_adapter
from tests.support import adapter_at

ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 4, "modules": ("q_proj", "down_proj")},
    {"rank": 1, "modules": ("q_proj",), "rslora": True},
    {"rank": 40, "modules": ("q_proj", "down_proj"), "alpha": -4.0},  # more ranks than inputs
    {"rank": 3, "modules": ("down_proj",), "dtype": "bfloat16"},
)


def test_directions_are_the_first_right_singular_vectors(base: Path, tmp_path: Path) -> None:
    folders = [tiny_adapter(tmp_path / str(n), base, seed=n, **one) for n, one in enumerate(ADAPTERS)]
    found = arrow_directions([load_factors(adapter_at(folder, base)) for folder in folders])
    assert len(found) == 4
    for path, directions in found.items():
        for own, folder in zip(directions, folders, strict=True):
            if path not in raw_factors(folder):
                assert not own.any()
                continue
            a, b, scale = raw_factors(folder)[path]
            top = torch.linalg.svd(scale * b.double() @ a.double())[2][0].float()
            assert own.dtype == torch.float32
            assert own[own.abs().argmax()] > 0
            torch.testing.assert_close(own, top * top[own.abs().argmax()].sign(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_an_adapter_that_does_nothing_has_no_direction(rank: int) -> None:
    idle = AdapterFactors("idle", {"x": LoraFactors(torch.randn(rank, 8), torch.zeros(6, rank), 2.0)})
    assert not arrow_directions([idle])["x"].any()
