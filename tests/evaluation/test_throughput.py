"""Throughput on the real engine with a tiny model: what is counted is what was made. No timings are asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.throughput import SINGLE, Throughput, measure_throughput
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Sampling
from tests.encoders import Hashing

QUESTIONS = MixedSet(tuple(MixedRow(f"question {n}", "", f"t{n % 3}", "d", "em") for n in range(5)))


@pytest.fixture
def ground(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> Ground:
    """Three adapters of a tiny base."""
    hub = open_hub(encoder=Hashing("h"), index="exact")
    for n in range(3):
        hub.register(tiny_adapter(tmp_path / f"t{n}", base, seed=n), samples=[f"sample {n}"], name=f"t{n}")
    return Ground(hub=hub, base_model=base, own={}, folder=tmp_path / "run")


def test_every_system_makes_all_its_tokens_at_every_batch_size(ground: Ground, tmp_path: Path) -> None:
    found = measure_throughput(ground, QUESTIONS, batches=(2, 1, 8), new_tokens=3, rounds=2)
    assert [(speed.system, speed.batch) for speed in found.speeds] == [
        (name, batch) for name in (SINGLE, "selection", "fusion", "mixture") for batch in (1, 2, 8)
    ]
    for speed in found.speeds:
        assert speed.tokens_per_s > 0
        assert speed.low <= speed.of_single <= speed.high
        # Whatever an answer says, it has three tokens.
        assert speed.tokens_per_s == pytest.approx(3 * speed.rows_per_s)
    assert all(speed.of_single == speed.low == speed.high == 1 for speed in found.speeds if speed.system == SINGLE)
    assert found.settings["new_tokens"] == 3
    assert found.settings["dtype"] == "float32"
    found.save(tmp_path / "new")
    assert Throughput.load(tmp_path / "new") == found


def test_the_hubs_own_engine_goes_on_ending_its_answers(ground: Ground, base: Path) -> None:
    prompts = [row.inputs for row in QUESTIONS.rows]
    before = ground.hub.generate(prompts, base_model=base, sampling=Sampling(4))
    measure_throughput(ground, QUESTIONS, batches=(2,), new_tokens=2, rounds=1)
    assert ground.hub.generate(prompts, base_model=base, sampling=Sampling(4)) == before
    assert ground.hub.engine(base).base.eos_ids


@pytest.mark.parametrize(
    "options", [{"batches": ()}, {"batches": (0,)}, {"rounds": 0}, {"new_tokens": 0}, {"questions": MixedSet(())}]
)
def test_nothing_to_measure_is_refused(ground: Ground, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="expected one question"):
        measure_throughput(ground, **({"questions": QUESTIONS} | options))  # type: ignore[arg-type]


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "throughput.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="measure_throughput"):
        Throughput.load(tmp_path)
