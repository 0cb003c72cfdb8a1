from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError
from lora_hub_sdk.retriever.evaluation import Evaluation, Question, evaluate_retriever
from lora_hub_sdk.retriever.figures import Curve, confusion_figure, curve_figure, similarity_figure
from lora_hub_sdk.retriever.tasks import Task
from tests.encoders import Hashing

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Four tasks; the names hold what a formula would be made of."""
    tasks = [Task("z", ("one",), "nli"), Task("a$b$", ("two",)), Task("m_", ("three",), "qa"), Task("c", ("4",), "nli")]
    questions = [Question(f"question {number}", tasks[number % 4].name) for number in range(12)]
    return evaluate_retriever(Hashing("h"), tasks, questions, resamples=0)


def pixels(image: Path) -> np.ndarray:
    from matplotlib.image import imread

    found: np.ndarray = imread(image)
    return found


def drawn(files: tuple[Path, Path]) -> dict[str, object]:
    """The data, once the picture has proved to be one and not blank."""
    image, numbers = files
    assert image.suffix == ".png"
    found = pixels(image)
    assert min(found.shape[:2]) >= 400
    assert found[..., :3].std() > 0.01
    data: dict[str, object] = json.loads(numbers.read_text("utf-8"))
    return data


def test_similarities_are_drawn_with_the_tasks_of_a_domain_side_by_side(evaluation: Evaluation, tmp_path: Path) -> None:
    data = drawn(similarity_figure(evaluation, tmp_path / "new" / "similarity"))
    assert data["tasks"] == ["c", "z", "m_", "a$b$"]
    assert data["domains"] == ["nli", "nli", "qa", None]
    order = [3, 0, 2, 1]
    assert np.allclose(np.array(data["cosine"]), evaluation.similarity[np.ix_(order, order)], atol=1e-4)


def test_confusions_are_drawn_and_their_counts_written(evaluation: Evaluation, tmp_path: Path) -> None:
    data = drawn(confusion_figure(evaluation, tmp_path / "v1.2"))
    order = [3, 0, 2, 1]
    assert data["count"] == evaluation.confusion[np.ix_(order, order)].tolist()
    assert {file.name for file in tmp_path.iterdir()} == {"v1.2.png", "v1.2.json"}


def test_curves_are_drawn_with_their_bands_and_written_as_given(tmp_path: Path) -> None:
    curves = [
        Curve("top 1", [48, 100, 10_000], [0.9, 0.8, 0.7], [0.85, 0.75, 0.6], [0.95, 0.85, 0.8]),
        Curve("top 3", [48, 10_000], [0.99, 0.9]),
    ]
    files = curve_figure(curves, tmp_path / "pool", title="Pool", x_label="adapters", y_label="share", log_x=True)
    data = drawn(files)
    assert (data["x"], data["y"], data["log_x"]) == ("adapters", "share", True)
    assert data["curves"] == [
        {
            "name": "top 1",
            "x": [48, 100, 10_000],
            "y": [0.9, 0.8, 0.7],
            "low": [0.85, 0.75, 0.6],
            "high": [0.95, 0.85, 0.8],
        },
        {"name": "top 3", "x": [48, 10_000], "y": [0.99, 0.9], "low": None, "high": None},
    ]
    plain = curve_figure(curves[1:], tmp_path / "plain", title="Pool", x_label="adapters", y_label="share")
    assert not np.array_equal(pixels(files[0]), pixels(plain[0]))


def test_many_tasks_are_drawn_without_their_names(tmp_path: Path) -> None:
    tasks = [Task(f"task {number}", (f"text {number}",)) for number in range(150)]
    found = evaluate_retriever(Hashing("h"), tasks, [Question("q", "task 3")], resamples=0)
    data = drawn(similarity_figure(found, tmp_path / "many"))
    assert len(data["tasks"]) == 150  # type: ignore[arg-type]


def test_curves_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="without curves"):
        curve_figure([], tmp_path / "x", title="", x_label="", y_label="")
    with pytest.raises(ConfigurationError, match="differ in length"):
        curve_figure([Curve("one", [1, 2], [1])], tmp_path / "x", title="", x_label="", y_label="")


def test_a_place_that_cannot_be_written_to_is_told(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        similarity_figure(evaluation, tmp_path / "file" / "similarity")


def test_without_matplotlib_the_command_that_installs_it_is_named(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-hub-sdk\[plots\]'"):
        similarity_figure(evaluation, tmp_path / "similarity")
    assert not list(tmp_path.iterdir())
