"""Guessed vectors, on adapters whose deltas are made to be alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.retriever.encoder import SentenceEncoder, mean_vector, unit
from lora_hub_sdk.retriever.guess import described, guess_vector, weight_likeness

Array = NDArray[np.float32]
MODULES = tuple(f"model.layers.{layer}.self_attn.{kind}" for layer in range(4) for kind in ("q_proj", "v_proj"))
WIDTH = 24
TEXTS = {
    "reviews": ["Is this movie review positive or negative?", "Is the customer happy with the phone?"],
    "french": ["Translate to French: the house is red.", "Translate to French: where is the station?"],
    "sums": ["What is 12 plus 30?", "Subtract 7 from 50."],
}


def write(folder: Path, *, task: int, seed: int, rank: int = 4, modules: tuple[str, ...] = MODULES) -> Path:
    """An adapter whose B spans the directions of its task and whose A is random."""
    shared, own = np.random.default_rng(task), np.random.default_rng(1000 + seed)
    directions = {module: shared.normal(size=(WIDTH, 2)) for module in MODULES}
    tensors: dict[str, Array] = {}
    for module in modules:
        a = own.normal(size=(rank, WIDTH)).astype(np.float32)
        b = (directions[module] @ own.normal(size=(2, rank))).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def known(encoder: SentenceEncoder, tmp_path: Path) -> list[tuple[Path, Array]]:
    """One adapter a task, each trained from a seed of its own."""
    return [
        (write(tmp_path / name, task=task, seed=task), mean_vector(encoder.encode(texts)))
        for task, (name, texts) in enumerate(TEXTS.items())
    ]


def nearest(vector: Array, known: list[tuple[Path, Array]]) -> str:
    return max(known, key=lambda pair: float(vector @ pair[1]))[0].name


# -- likeness of weights -------------------------------------------------------------------------------------


def dense_likeness(one: Path, other: Path) -> float:
    """By the definition, with whole matrices."""
    from safetensors.numpy import load_file

    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    cosines = []
    for module in MODULES:
        key = f"base_model.model.{module}.lora_"
        d, e = (side[f"{key}B.weight"] @ side[f"{key}A.weight"] for side in (left, right))
        d, e = d @ d.T, e @ e.T
        cosines.append(np.sum(d * e) / np.linalg.norm(d) / np.linalg.norm(e))
    return float(np.mean(cosines))


def test_likeness_is_the_cosine_of_what_the_deltas_write_whatever_the_ranks(tmp_path: Path) -> None:
    one = write(tmp_path / "one", task=0, seed=1)
    others = [write(tmp_path / f"{task}", task=task, seed=5 + task, rank=3 + task) for task in range(3)]
    found = weight_likeness(one, [one, *others])
    assert found[0] == pytest.approx(1.0)
    assert found[1:] == pytest.approx([dense_likeness(one, other) for other in others], abs=1e-6)
    assert found[1] > 2 * max(found[2:])


def test_likeness_is_the_same_at_every_scale(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    one, other = write(tmp_path / "one", task=0, seed=1), write(tmp_path / "other", task=0, seed=2)
    expected = weight_likeness(one, [other])
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({key: tensor * 100 for key, tensor in tensors.items()}, other / "adapter_model.safetensors")
    assert weight_likeness(one, [other]) == pytest.approx(expected)


def test_only_shared_modules_are_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "one", task=0, seed=1)
    part = write(tmp_path / "part", task=0, seed=1, modules=MODULES[:1])
    apart = write(tmp_path / "apart", task=0, seed=1, modules=MODULES[1:2])
    assert np.isfinite(weight_likeness(one, [part]))
    assert np.isnan(weight_likeness(part, [apart]))


def test_weights_that_cannot_be_compared_are_left_out(tmp_path: Path) -> None:
    one = write(tmp_path / "one", task=0, seed=1)
    damaged, wide, zero, broken = (write(tmp_path / name, task=0, seed=1) for name in ("d", "w", "z", "b"))
    (damaged / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    for folder, shape, value in ((wide, (WIDTH + 1, 4), 1.0), (zero, (WIDTH, 4), 0.0), (broken, (WIDTH, 4), np.nan)):
        a, b = np.ones((4, WIDTH), np.float32), np.full(shape, value, np.float32)
        keys = [f"base_model.model.{module}.lora_" for module in MODULES]
        tensors = {f"{key}A.weight": a for key in keys} | {f"{key}B.weight": b for key in keys}
        save_file(tensors, folder / "adapter_model.safetensors")
    assert np.isnan(weight_likeness(one, [tmp_path / "nowhere", damaged, wide, zero, broken])).all()


# -- the guess -----------------------------------------------------------------------------------------------


def test_weights_alone_find_the_task_of_another_training(
    encoder: SentenceEncoder, known: list[tuple[Path, Array]], tmp_path: Path
) -> None:
    for task, name in enumerate(TEXTS):
        mine = write(tmp_path / "mine", task=task, seed=50 + task, rank=6)
        guess = guess_vector(encoder, text="", weights=mine, known=known, source="mine")
        assert nearest(guess, known) == name
        assert np.linalg.norm(guess) == pytest.approx(1.0, abs=1e-6)


def test_text_alone_finds_its_task(encoder: SentenceEncoder, known: list[tuple[Path, Array]]) -> None:
    text = "French translation of short sentences"
    guess = guess_vector(encoder, text=text, weights=None, known=known, source="mine")
    assert nearest(guess, known) == "french"


def test_weights_that_agree_bring_the_guess_nearer_than_the_text_alone(
    encoder: SentenceEncoder, known: list[tuple[Path, Array]], tmp_path: Path
) -> None:
    mine, truth = write(tmp_path / "mine", task=2, seed=9), known[2][1]
    by_text, by_both = (
        guess_vector(encoder, text="Sums of numbers", weights=folder, known=known, source="mine")
        for folder in (None, mine)
    )
    assert truth @ by_both > truth @ by_text


def test_without_known_adapters_the_text_stands_for_itself(encoder: SentenceEncoder) -> None:
    guess = guess_vector(encoder, text="French", weights=Path("nowhere"), known=[], source="mine")
    assert guess == pytest.approx(unit(encoder.encode(["French"])[0]))


def test_beside_one_known_adapter_the_text_keeps_half(
    encoder: SentenceEncoder, known: list[tuple[Path, Array]]
) -> None:
    guess = guess_vector(encoder, text="Sums", weights=known[0][0], known=known[:1], source="mine")
    assert guess == pytest.approx(unit(encoder.encode(["Sums"])[0] + known[0][1]), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_guess_from_asks_for_samples(
    encoder: SentenceEncoder, known: list[tuple[Path, Array]], count: int
) -> None:
    with pytest.raises(SamplesError, match=r"mine.*give samples"):
        guess_vector(encoder, text=" ", weights=known[2][0], known=known[:count], source="mine")


def test_without_text_and_readable_weights_nothing_is_guessed(
    encoder: SentenceEncoder, known: list[tuple[Path, Array]], tmp_path: Path
) -> None:
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(SamplesError, match="give samples"):
            guess_vector(encoder, text="", weights=folder, known=known, source="mine")


def test_known_adapters_whose_files_are_gone_still_count_by_text(
    encoder: SentenceEncoder, known: list[tuple[Path, Array]], tmp_path: Path
) -> None:
    gone = [(tmp_path / "gone", vector) for _, vector in known]
    mine = write(tmp_path / "mine", task=0, seed=9)
    guess = guess_vector(encoder, text="French translation", weights=mine, known=gone, source="mine")
    assert int(np.argmax([guess @ vector for _, vector in gone])) == 1


def test_vectors_without_a_common_direction_are_no_guess(encoder: SentenceEncoder, tmp_path: Path) -> None:
    vector = encoder.encode(["a"])[0]
    folders = [write(tmp_path / name, task=0, seed=1) for name in "ab"]
    opposed = [(folders[0], vector), (folders[1], -vector)]
    with pytest.raises(SamplesError, match="give samples"):
        guess_vector(encoder, text="", weights=folders[0], known=opposed, source="mine")


# -- what is said of an adapter ------------------------------------------------------------------------------


def test_a_description_keeps_what_tells_something() -> None:
    tags = ("lora", "PEFT", "license:mit", "base_model:x/y", "sentiment", "movies")
    assert described("ann/lora-sst2_v1", " Good? ", None, "", tags=tags) == "lora sst2 v1\nGood?\nsentiment, movies"
    assert described("", None, tags=("lora",)) == ""
