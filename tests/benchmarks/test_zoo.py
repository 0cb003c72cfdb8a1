from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _zoo as zoo
from benchmarks import zoo as training
from benchmarks._variants_weights import _samples
from lora_hub_sdk.demo.training._learning import Learner
from lora_hub_sdk.demo.training._rows import Row
from lora_hub_sdk.demo.training.recipes import Recipe
from lora_hub_sdk.evaluation.mixed_set import read_mixed
from lora_hub_sdk.hub import LoraHub
from tests.benchmarks.zoos import small_zoo as small_zoo
from tests.benchmarks.zoos import write_rows
from tests.encoders import Hashing


@pytest.fixture
def training_of(base: Path, tmp_path: Path) -> training.Training:
    """Two steps on a tiny base."""
    write_rows(tmp_path / "rows", "fruit", "train", 24)
    learner = training.new_learner(str(base), "cpu")
    recipe = Recipe(2, 4, ("q_proj", "down_proj"), 2)
    return training.Training(learner, recipe, tmp_path / "rows", tmp_path / "zoo", held_out=4)


def test_a_hub_takes_what_was_trained(training_of: training.Training, base: Path, tmp_path: Path) -> None:
    folder = training.train_task("fruit", training_of)
    told = json.loads((folder / "training.json").read_text())
    assert (told["task"], told["domain"], told["metric"]) == ("fruit", "fruit and more", "em")
    assert (told["steps"], told["r"], told["train_rows"]) == (2, 2, 20)
    assert told["loss1"] != told["loss0"]
    with LoraHub(tmp_path / "hub.db", index="exact", encoder=Hashing("plain")) as hub:
        adapter = hub.register(folder, base_model=base, samples=["Say apple"])
    assert adapter.rank == 2


def test_a_complete_folder_is_left_as_it_is_and_another_is_made_again(training_of: training.Training) -> None:
    folder = training.train_task("fruit", training_of)
    weights = folder / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert training.train_task("fruit", training_of) == folder
    assert weights.stat().st_mtime_ns == before
    (folder / "training.json").unlink()
    training.train_task("fruit", training_of)
    assert (folder / "training.json").is_file()
    assert weights.stat().st_mtime_ns != before
    assert [path.name for path in training_of.output.iterdir()] == ["fruit"]


def test_prompts_are_cut_from_their_beginning_for_training_and_never_the_answer(base: Path) -> None:
    learner = Learner(base, prompt_tokens=5)
    whole = Learner(base)
    row = Row("a question that is longer", "answer")
    cut, full = learner._encode(row), whole._encode(row)
    assert cut.answer_length == full.answer_length
    assert cut.ids == full.ids[-5 - full.answer_length :]


def test_no_question_is_learned_and_scored(tmp_path: Path) -> None:
    write_rows(tmp_path, "fruit", "train", 30)
    rows = read_mixed(tmp_path / "fruit.train.jsonl").rows
    learned, held_out = training.split_rows((*rows, *rows), 10, seed=0)
    assert len(learned) == 20
    assert len(held_out) == 10
    assert not {row.inputs for row in learned} & {row.inputs for row in held_out}
    assert training.split_rows(rows, 10, seed=0) == (learned, held_out)
    assert training.split_rows(rows, 10, seed=1)[1] != held_out


def test_adapters_are_named_as_their_tasks_and_told_by_their_training_rows(small_zoo: Path, tmp_path: Path) -> None:
    with LoraHub(tmp_path / "hub.db", index="exact", encoder=Hashing("plain")) as hub:
        own = zoo.register_zoo(hub, [small_zoo])
        assert own == {"one": "one", "two": "two"}
        assert zoo.register_zoo(hub, [small_zoo]) == own
        assert hub.get("one").tags == ("domain:fruit and more",)
        assert len(hub.samples("one")) == 20
        learned = zoo.zoo_training(tuple(own))
        assert {row.inputs for row in learned.rows if row.task == "one"} == {*hub.samples("one")}


def test_the_first_folder_of_a_task_counts_and_half_a_folder_does_not(small_zoo: Path) -> None:
    assert zoo.zoo_folders([small_zoo]) == {name: zoo.ADAPTERS / name for name in ("one", "two")}


def test_no_question_stands_among_training_rows(small_zoo: Path) -> None:
    asked = zoo.zoo_questions(zoo.zoo_tasks(), 20)
    # Two of each task's ten do.
    assert len(asked) == 3 * 8
    assert len(zoo.zoo_questions(("one",), 5)) == 5


def test_samples_are_those_of_the_other_benchmarks(shared: Path) -> None:
    assert [row.inputs for row in zoo.zoo_training(("trec",)).rows] == _samples("trec")
