"""Figures of a made-up run: each is an image, and its data file has the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_hub_sdk.evaluation.answers import Answer, AnswerFile
from lora_hub_sdk.evaluation.figures import draw_figures
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.record import RunRecord, SystemRecord
from lora_hub_sdk.evaluation.results import write_questions
from lora_hub_sdk.evaluation.throughput import Speed, Throughput
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from tests.encoders import Hashing

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

QUESTIONS = MixedSet(tuple(MixedRow(f"q{n}", "x", f"t{n % 2}", f"d{n % 2}", "em") for n in range(8)))
SCORES = {
    "base": [0.0] * 8,
    "selection": [100.0, 0.0, 100.0, 0.0, 0.0, 100.0, 0.0, 100.0],
    "mixture": [100.0, 100.0, 0.0, 0.0, 100.0, 100.0, 0.0, 100.0],
    "mixture@8": [0.0, 100.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0],
}


def write_run(folder: Path) -> Path:
    """As a run would have left it; mixture@8 is of the figure alone."""
    folder.mkdir(parents=True)
    listed = {name: SystemRecord(listed="@" not in name) for name in [*SCORES, "perfect"]}
    RunRecord({"questions": QUESTIONS.digest, "base model": "some/base"}, systems=listed).write(folder)
    write_questions(QUESTIONS, folder)
    with AnswerFile(folder) as file:
        for name, scores in SCORES.items():
            for place, score in enumerate(scores):
                row = QUESTIONS.rows[place]
                file.append([Answer(name, place, row.task, row.domain, "em", text="", score=score)])
    return folder


def drawn(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The data of each figure, once the picture has proved to be one and not blank."""
    from matplotlib.image import imread

    images = [file for file in files if file.suffix == ".png"]
    assert [image.with_suffix(".json") for image in images] == [file for file in files if file not in images]
    for image in images:
        pixels = imread(image)
        assert min(pixels.shape[:2]) >= 150
        assert pixels[..., :3].std() > 0.01
    return {image.stem: json.loads(image.with_suffix(".json").read_text("utf-8")) for image in images}


def test_what_the_answers_tell_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    found = drawn(draw_figures(folder))
    assert found.keys() == {"systems", "quality_by_k"}
    systems = found["systems"]["systems"]
    # A system without answers has no bar, and one of another figure no place.
    assert list(systems) == ["base", "selection", "mixture"]
    assert systems["selection"]["value"] == 50
    assert systems["selection"]["low"] < 50 < systems["selection"]["high"]
    assert systems["base"] == {"group": "reference", "value": 0, "low": None, "high": None}
    (curve,) = found["quality_by_k"]["curves"]
    assert (curve["name"], curve["x"], curve["y"]) == ("mixture", [1, 3, 8], [50, 62.5, 25])


def test_throughput_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    speeds = [
        Speed(name, batch, rate * batch, 1, 1, 1, 1)
        for name, rate in (("single", 40), ("fusion", 30))
        for batch in (1, 4)
    ]
    Throughput({"base_model": "some/base", "dtype": "float32", "device": "cpu"}, tuple(speeds)).save(folder)
    curves = drawn(draw_figures(str(folder)))["throughput"]["curves"]
    assert [(one["name"], one["x"], one["y"]) for one in curves] == [
        ("single", [1, 4], [40, 160]),
        ("fusion", [1, 4], [30, 120]),
    ]


def test_the_pool_is_drawn_by_domain(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> None:
    hub = open_hub(encoder=Hashing("h"), index="exact")
    tags = {"own": (), "tagged": ("domain:a",), "alone": (), "gone": ()}
    for seed, (name, own) in enumerate(tags.items()):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed), samples=[f"of {name}"], name=name, tags=own)
    hub.retire("gone")
    ground = Ground(hub=hub, base_model=base, own={"t1": "own"}, folder=tmp_path)
    data = drawn(draw_figures(write_run(tmp_path / "run"), ground=ground))["similarity"]
    assert data["tasks"] == ["tagged", "own", "alone"]
    assert data["domains"] == ["a", "d1", None]
    assert np.allclose(np.diag(data["cosine"]), 1)
