from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import _variants_weights as weights


def test_a_system_is_measured_against_the_own_adapter_task_by_task_and_as_a_whole() -> None:
    tasks = np.array(["a"] * 4 + ["b"] * 4)
    own = np.array([100.0] * 4 + [20.0] * 4)
    half = np.array([100.0] * 4 + [10.0] * 4)
    found = weights._figures({weights.OWN: own, "half": half}, tasks)
    assert found[weights.OWN]["of_own"] == {"value": 1, "low": 1, "high": 1}
    assert found["half"]["of_own"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert found["half"]["of_own_all"]["value"] == pytest.approx((100 + 10) / (100 + 20))
    assert found["half"]["score"] == 55


def test_intervals_cover_what_other_questions_would_have_given() -> None:
    rng = np.random.default_rng(1)
    tasks = np.repeat(["a", "b"], 50)
    scores = {name: np.where(rng.uniform(size=100) < p, 100.0, 0.0) for name, p in ((weights.OWN, 0.8), ("other", 0.6))}
    share = weights._figures(scores, tasks)["other"]["of_own_all"]
    assert share["low"] < share["value"] < share["high"]
    assert share["low"] < 0.75 < share["high"]


def test_it_is_skipped_where_there_are_no_adapters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "ADAPTERS", tmp_path / "none")
    weights.main(["--json"])
    assert "skipped" in capsys.readouterr().out
