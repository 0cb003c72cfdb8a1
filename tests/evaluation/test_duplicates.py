"""How copies crowd a route, on a pool where that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.duplicates import study_duplicates
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.near_duplicates import write_noisy
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from tests.encoders import Hashing

QUESTIONS = MixedSet(tuple(MixedRow(f"of {name}", "x", name, "d", "em") for name in ("a", "b", "no adapter")))
STRATEGIES = ("selection", "mixture", "fusion")
COPIES = {"a-1": "a", "a-2": "a"}


@pytest.fixture
def ground(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> Ground:
    """Adapter a, two copies with the same samples, and three other adapters."""
    hub = open_hub(encoder=Hashing("h"), index="exact")
    a = tiny_adapter(tmp_path / "a", base)
    hub.register(a, samples=["of a"], name="a")
    for seed, name in enumerate(COPIES):
        hub.register(write_noisy(a, tmp_path / name, share=0.01, seed=seed), samples=["of a"], name=name)
    for seed, name in enumerate("bcd", start=1):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed), samples=[f"of {name}"], name=name)
    return Ground(hub=hub, base_model=base, own={"a": "a", "b": "b"}, folder=tmp_path / "learned")


def test_copies_fill_the_routes_of_their_task_and_leaving_them_out_frees_these(ground: Ground, tmp_path: Path) -> None:
    found = study_duplicates(ground, QUESTIONS, copies=COPIES, output=tmp_path / "run", strategies=STRATEGIES)
    assert found.keys() == {"copied", "others"}
    copied = found["copied"]
    assert (copied["mixture"].crowded, copied["mixture"].distinct) == (1, 1)
    assert copied["mixture"].family_weight == pytest.approx(1)
    assert (copied["mixture without copies"].crowded, copied["mixture without copies"].distinct) == (0, 3)
    assert copied["mixture without copies"].family_weight == pytest.approx(1 / 3)
    # Two of the three nearest are still copies where only the original's name is left out.
    assert (copied["fusion-ood"].crowded, copied["fusion-ood"].distinct) == (1, 2)
    assert copied["fusion-ood"].family_weight == pytest.approx(2 / 3)
    assert copied["fusion without copies-ood"].distinct == 3
    assert all(one.crowded == 0 for name, one in found["others"].items() if "without copies" in name)
    assert copied["selection"].as_dict()["family_weight"] == 1


def test_nothing_to_study_is_refused(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="0 copies"):
        study_duplicates(ground, QUESTIONS, copies={}, output=tmp_path)
    with pytest.raises(ConfigurationError, match="0 questions"):
        study_duplicates(replace(ground, own={}), QUESTIONS, copies=COPIES, output=tmp_path)
