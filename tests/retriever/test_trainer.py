"""Training of the encoder: what comes of it, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_hub_sdk.errors import ConfigurationError, ModelNotFoundError, SamplesError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model, weights_fingerprint
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.retriever.settings import INSTRUCTION, read_settings
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.retriever.trainer import RetrieverTrainer
from lora_hub_sdk.retriever.training_report import TrainingReport
from lora_hub_sdk.testing import tiny_adapter, tiny_encoder

#: The same letters in another order: an untrained encoder of bytes can hardly tell these apart.
FRAMES = {
    "stop": "stop {} now",
    "pots": "pots {} won",
    "post": "{} post own",
    "tops": "{} tops now",
    "opts": "won opts {}",
    "spot": "own spot {}",
}
WORDS = ["oak", "river", "lamp", "stone", "cloud", "paper", "horse", "bread", "glass", "wheel"]
TASKS = [Task(name, tuple(frame.format(word) for word in WORDS), "d") for name, frame in FRAMES.items()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def trainer(tiny: Path, **options: Any) -> RetrieverTrainer:
    options = {"steps": 12, "check_every": 4, "learning_rate": 3e-3, "max_tokens": 128, **options}
    return RetrieverTrainer(encoder=tiny, device="cpu", offline=True, **options)


def test_training_brings_samples_nearer_to_their_adapters(tiny: Path, tmp_path: Path) -> None:
    report = trainer(tiny, steps=150).fit_tasks(TASKS, output_dir=tmp_path / "out")
    assert report.before is not None
    assert report.after is not None
    assert report.after.top_1 > report.before.top_1 + 0.2
    assert report.losses[-1] < report.losses[0] / 2
    assert (report.steps, report.best_step, report.texts) == (150, 150, 60)
    assert set(report.trained) == set(FRAMES)
    assert (report.held_out, report.unseen, report.unseen_after) == ((), (), None)


def test_the_folder_loads_in_plain_sentence_transformers(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    report = trainer(tiny).fit_tasks(TASKS, output_dir=tmp_path / "out")
    plain = SentenceTransformer(str(report.folder), device="cpu")
    texts = ["stop oak now", "etwas anderes", ""]
    expected = SentenceEncoder(resolve_model(report.folder), device="cpu").encode(texts)
    by_hand = plain.encode([INSTRUCTION + text for text in texts], normalize_embeddings=True)
    by_name = plain.encode(texts, prompt_name="task", normalize_embeddings=True)
    np.testing.assert_allclose(by_hand, expected, atol=1e-6)
    np.testing.assert_allclose(by_name, expected, atol=1e-6)
    # As much of a text is read as before; what training reads of it is no matter of the model.
    assert plain.max_seq_length == SentenceTransformer(str(tiny), device="cpu").max_seq_length == 192
    assert not (report.folder / "checkpoints").exists()
    modes = {file.stat().st_mode for file in report.folder.glob("*.*") if file.is_file()}
    assert len(modes) == 1


def test_the_card_tells_settings_and_scores_and_no_text(tiny: Path, tmp_path: Path) -> None:
    report = trainer(tiny, seed=5).fit_tasks(TASKS, output_dir=tmp_path / "out", fraction=0.5)
    from huggingface_hub import ModelCard

    card = ModelCard.load(report.folder / "README.md")
    assert card.data.library_name == "sentence-transformers"
    for told in (report.fingerprint, "seed 5", "| temperature | 0.05 |", *report.trained, "tasks never seen"):
        assert told in card.text
    every = "".join(file.read_text("utf-8", "ignore") for file in report.folder.rglob("*.*") if file.is_file())
    for task in TASKS:
        assert not any(text in every for text in task.inputs)
    assert str(tmp_path) not in every
    assert str(tiny) not in every


def test_the_settings_of_a_trained_folder_are_those_of_the_training(tiny: Path, tmp_path: Path) -> None:
    report = trainer(tiny, instruction="Which task: ").fit_tasks(TASKS, output_dir=tmp_path / "out")
    settings = read_settings(report.folder)
    assert settings.instruction == "Which task: "
    assert settings.rerank
    assert SentenceEncoder(resolve_model(report.folder)).fingerprint == report.fingerprint


def seed_all() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_random_states_alone(tiny: Path, tmp_path: Path) -> None:
    seed_all()
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    seed_all()
    first = trainer(tiny, seed=3).fit_tasks(TASKS, output_dir=tmp_path / "first")
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    second = trainer(tiny, seed=3).fit_tasks(TASKS, output_dir=tmp_path / "second")
    other = trainer(tiny, seed=4).fit_tasks(TASKS, output_dir=tmp_path / "third")
    read = [(report.folder / "model.safetensors").read_bytes() for report in (first, second, other)]
    assert read[0] == read[1] != read[2]
    assert first.losses == second.losses


def test_a_training_that_ended_is_not_repeated(tiny: Path, tmp_path: Path) -> None:
    first = trainer(tiny).fit_tasks(TASKS, output_dir=tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert trainer(tiny).fit_tasks(TASKS, output_dir=tmp_path / "out") == first
    assert TrainingReport.read(tmp_path / "out") == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written


def test_a_run_that_was_killed_before_its_report_does_not_train_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lora_hub_sdk.retriever.trainer.write_card", die)
        with pytest.raises(KeyboardInterrupt):
            trainer(tiny).fit_tasks(TASKS, output_dir=tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    report = trainer(tiny).fit_tasks(TASKS, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    assert report.losses
    assert report == TrainingReport.read(tmp_path / "out")


@pytest.mark.parametrize("changed", [{"seed": 9}, {"steps": 13}, {"temperature": 0.1}])
def test_a_folder_of_another_training_is_not_touched(tiny: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    trainer(tiny, steps=4).fit_tasks(TASKS, output_dir=tmp_path / "out")
    held = weights_fingerprint(tmp_path / "out")
    with pytest.raises(ConfigurationError, match="another training"):
        trainer(tiny, **changed).fit_tasks(TASKS, output_dir=tmp_path / "out")
    assert weights_fingerprint(tmp_path / "out") == held


def test_a_folder_that_holds_something_else_is_not_touched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigurationError, match="not empty"):
        trainer(tiny).fit_tasks(TASKS, output_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def train_slowly(tiny: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer(tiny, steps=160, validation=0.0).fit_tasks(TASKS, output_dir=folder)


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tiny: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = trainer(tiny, steps=160).fit_tasks(TASKS, output_dir=tmp_path / "whole")
        process = multiprocessing.get_context("spawn").Process(target=train_slowly, args=(tiny, tmp_path / "killed"))
        process.start()
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("checkpoints/checkpoint-*/trainer_state.json")):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (tmp_path / "killed" / "training.json").exists()
        with pytest.raises(ConfigurationError, match="not finished"):
            trainer(tiny, steps=159).fit_tasks(TASKS, output_dir=tmp_path / "killed")
        # A checkpoint that the kill left incomplete is passed over.
        (tmp_path / "killed" / "checkpoints" / "checkpoint-156").mkdir()
        resumed = trainer(tiny, steps=160).fit_tasks(TASKS, output_dir=tmp_path / "killed")
    finally:
        torch.set_num_threads(threads)
    assert resumed.steps == 160
    read = [(report.folder / "model.safetensors").read_bytes() for report in (whole, resumed)]
    assert read[0] == read[1]


def test_held_out_adapters_stop_the_training_and_choose_the_weights(tiny: Path, tmp_path: Path) -> None:
    # With a learning rate of next to nothing no check is better than the first.
    report = trainer(tiny, steps=100, check_every=2, validation=0.3, patience=2, learning_rate=1e-12).fit_tasks(
        TASKS, output_dir=tmp_path / "out"
    )
    assert (report.best_step, report.steps) == (2, 6)
    assert len(report.held_out) == 2
    assert not set(report.held_out) & set(report.trained)
    assert report.texts == 40


def test_the_fraction_that_is_not_drawn_is_never_trained_on(tiny: Path, tmp_path: Path) -> None:
    report = trainer(tiny, seed=1).fit_tasks(TASKS, output_dir=tmp_path / "one", fraction=0.5)
    assert len(report.trained) == len(report.unseen) == 3
    assert report.unseen_before is not None
    assert report.unseen_after is not None
    assert report.unseen_after.searches == 30
    # Other texts of unseen tasks leave the weights as they are.
    changed = [
        task if task.name in report.trained else Task(task.name, tuple(text + "!" for text in task.inputs), task.domain)
        for task in TASKS
    ]
    again = trainer(tiny, seed=1).fit_tasks(changed, output_dir=tmp_path / "two", fraction=0.5)
    assert weights_fingerprint(again.folder) == weights_fingerprint(report.folder)


def test_rows_of_a_file_and_adapters_of_a_hub_train_alike(
    tiny: Path, tmp_path: Path, base: Path, open_hub: Callable[..., LoraHub]
) -> None:
    file = tmp_path / "tasks.jsonl"
    rows = [{"task": task.name, "domain": task.domain, "inputs": text} for task in TASKS for text in task.inputs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    from_file = trainer(tiny).fit_jsonl(file, output_dir=tmp_path / "file", fraction=0.5)
    hub = open_hub()
    for number, task in enumerate(TASKS):
        folder = tiny_adapter(tmp_path / "adapters" / task.name, base, seed=number)
        hub.register(folder, base_model=base, samples=task.inputs, tags=["domain:d"])
    options: dict[str, Any] = {"steps": 12, "check_every": 4, "learning_rate": 3e-3, "max_tokens": 128, "device": "cpu"}
    from_hub = hub.train_retriever(output_dir=tmp_path / "hub", fraction=0.5, encoder=tiny, **options)
    # A hub lists adapters by name, so the plan of the steps is another one.
    assert set(from_hub.trained) == set(from_file.trained)
    again = trainer(tiny).fit(hub, output_dir=tmp_path / "again", fraction=0.5)
    assert weights_fingerprint(again.folder) == weights_fingerprint(from_hub.folder)


@pytest.mark.parametrize(
    "tasks",
    [
        [Task("a", ("one text",)), Task("b", ("another text",))],
        [
            Task("a", ("x" * 100_000, "y " * 50_000)),
            Task("b", ("\ud800 lone", "z\0z")),
            Task("c", ("日本語の文", "другой текст")),
        ],
        [Task("a", ("shared", "own a")), Task("b", ("shared", "own b")), Task("twin of a", ("own a", "shared"))],
        [Task("a", ("", "x y", "   ")), Task("b", ("?", "!"))],
    ],
    ids=["one sample each", "huge and mixed texts", "duplicates across adapters", "empty texts"],
)
def test_odd_pools_give_a_sound_model(tiny: Path, tmp_path: Path, tasks: list[Task]) -> None:
    if tasks[-1].name == "twin of a":
        with pytest.raises(SamplesError, match="no other has"):
            trainer(tiny, steps=4).fit_tasks(tasks, output_dir=tmp_path / "out")
        tasks = [*tasks, Task("d", ("own d",))]
    report = trainer(tiny, steps=4).fit_tasks(tasks, output_dir=tmp_path / "out")
    vectors = SentenceEncoder(resolve_model(report.folder)).encode(["any text", "", "日本"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_one_adapter_has_nothing_to_be_told_apart_from(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="two tasks or more"):
        trainer(tiny).fit_tasks(TASKS[:1], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_tasks_of_one_name_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="one name"):
        trainer(tiny).fit_tasks([*TASKS, TASKS[0]], output_dir=tmp_path / "out")


def test_an_encoder_that_nobody_has_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        trainer(tmp_path / "none").fit_tasks(TASKS, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"negatives": 0},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"learning_rate": float("inf")},
        {"epochs": True},
        {"hard": 1.1},
        {"validation": 1},
        {"patience": 0},
        {"check_every": "20"},
        {"seed": -1},
        {"precision": "int8"},
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=f"{name}="):
        RetrieverTrainer(**options)
