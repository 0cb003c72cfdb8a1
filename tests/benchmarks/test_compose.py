"""The composition benchmark on a tiny model: its report has the promised shape and its systems agree. No timings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compose import AGREE, RATIOS, main
from lora_hub_sdk.testing.tiny import tiny_adapter, tiny_base

pytestmark = pytest.mark.slow

BATCH = 4
ROUNDS = 2
SMALL = f"--batch={BATCH} --rounds={ROUNDS} --prompt-tokens=12 --new-tokens=6 --adapters=6 --rank=2 --threads=1".split()


def run(capsys: pytest.CaptureFixture[str], base: Path, *options: str) -> list[dict[str, Any]]:
    main(["--json", "--base-model", str(base), *SMALL, *options])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def test_one_report_for_each_dtype(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    reports = run(capsys, base, "--dtype", "both")

    assert [report["settings"]["dtype"] for report in reports] == ["float32", "bfloat16"]
    for report in reports:
        assert report.keys() == {"machine", "settings", "systems", "ratios", "agree"}
        assert report["machine"].keys() >= {"cpu", "threads", "torch"}
        assert all(len(system["tokens_per_s"]) == ROUNDS for system in report["systems"].values())
        assert report["systems"]["mixture"].keys() >= {"median", "first_token_s"}
        assert list(report["ratios"]) == [f"{own} / {other}" for own, other in RATIOS]
        assert all(ratio["min"] <= ratio["median"] <= ratio["max"] for ratio in report["ratios"].values())
        asked = report["ratios"]["mixture / base"]
        assert (asked["asked"], asked["reached"]) == (">= 0.8", asked["median"] >= 0.8)


def test_systems_agree_in_float32(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    (report,) = run(capsys, base, "--dtype", "float32")

    assert report["agree"] == {f"{own} == {other}": {"rows_equal": BATCH, "rows": BATCH} for own, other in AGREE}


def test_real_adapters_of_differing_modules_and_ranks(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    for seed, (rank, modules) in enumerate([(2, ("q_proj",)), (3, ("q_proj", "up_proj")), (4, ("v_proj", "up_proj"))]):
        tiny_adapter(tmp_path / f"adapter-{seed}", base, rank=rank, modules=modules, seed=seed)

    (report,) = run(capsys, base, "--dtype", "float32", "--adapter-folder", str(tmp_path))

    assert report["settings"]["adapters"] == 3
    assert all(found["rows_equal"] == BATCH for found in report["agree"].values())


def test_tables_for_people(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    main(["--base-model", str(base), "--dtype", "float32", "--batch", "2", "--rounds", "1", "--adapters", "4"])

    out = capsys.readouterr().out
    assert "mixture / base" in out
    assert "base == transformers: 2 of 2 rows" in out
