from __future__ import annotations

import json

import pytest

from benchmarks.demo_adapters import main


@pytest.mark.slow
def test_a_packaged_adapter_beats_the_base_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json", "--task", "sentiment"])
    (gain,) = json.loads(capsys.readouterr().out)["adapters"]
    assert gain["rows"] == 50
    assert gain["gain"] >= 20
