"""The variants benchmark on a tiny model: what it compares is what it says. No timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks._workload import random_adapters
from benchmarks.variants import RandomGate, main
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import load_base_model
from lora_hub_sdk.engine.fitting import Fitting
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing.tiny import tiny_base

SMALL = [
    "--batch=4",
    "--prompt-tokens=12",
    "--shortest=12",
    "--new-tokens=4",
    "--adapters=6",
    "--rank=2",
    "--rounds=1",
    "--threads=1",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def test_each_variant_is_compared_with_the_plain_mixture(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json", "--part=speed", "--dtype=float32", "--base-model", str(base), *SMALL])
    found = json.loads(capsys.readouterr().out)
    names = {"rsLoRA", "DoRA", "embedding and head", "norms of their own", "base", "RAMoLE"}
    assert found["ratios"].keys() == {f"{name} / plain" for name in names}
    assert found["ratios"]["DoRA / plain"]["asked"] == ">= 0.7"
    assert found["ratios"]["RAMoLE / plain"]["asked"] == ">= 0.6"


def test_random_variants_differ_and_stay_near_the_base(base: Path, tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path, base, 3, 2, dora=True)
    loaded = load_base_model(resolve_model(base))
    fitting = Fitting(loaded.modules, embedding=loaded.embedding)
    found = [fitting.fit(load_factors(adapter)) for adapter in adapters]
    gains = [one.gain for factors in found for one in factors.modules.values() if one.gain is not None]
    assert len(gains) == sum(len(factors.modules) for factors in found)
    assert all(float(gain.min()) > 0.2 and float(gain.max()) < 5 for gain in gains)
    assert len({adapter.digest for adapter in adapters}) == 3


def test_the_random_gate_has_every_linear_module_of_the_model(base: Path) -> None:
    loaded = load_base_model(resolve_model(base))
    gate = RandomGate.on(loaded.shapes, 3)
    for path, (d_out, d_in) in loaded.shapes.items():
        a, b = gate.module(path) or ((), ())
        assert (tuple(a.shape), tuple(b.shape)) == ((3, d_in), (d_out, 3))  # type: ignore[union-attr]


def test_options_of_a_part_are_refused_by_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--part=speed", "--steps=3"])
    assert "unknown options: --steps=3" in capsys.readouterr().err
