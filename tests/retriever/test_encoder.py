from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import INSTRUCTION, SentenceEncoder, mean_vector, unit


def test_vectors_have_length_one_and_follow_meaning(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["Translate to French: good day", "Übersetze: guten Tag", "What is 3 + 4?"])
    assert vectors.shape == (3, encoder.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_a_text_has_one_vector_whatever_its_neighbours(encoder: SentenceEncoder) -> None:
    together = encoder.encode(["short", "a much longer text " * 30])
    np.testing.assert_allclose(encoder.encode(["short"])[0], together[0], atol=1e-5)


def test_no_texts_give_no_vectors(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.parametrize("text", ["a" * 3_000_000, "\N{GRINNING FACE}" * 5000, "\0", "日本語の文", "مرحبا بالعالم"])
def test_huge_and_foreign_texts_are_encoded(encoder: SentenceEncoder, text: str) -> None:
    assert np.isfinite(encoder.encode([text])).all()


def test_the_fingerprint_names_weights_configuration_and_instruction(encoder: SentenceEncoder, tmp_path: Path) -> None:
    resolved = resolve_model("all-minilm-l6-v2")
    assert SentenceEncoder(resolved).fingerprint == encoder.fingerprint
    assert SentenceEncoder(resolved, instruction="").fingerprint != encoder.fingerprint
    copy = shutil.copytree(resolved.folder, tmp_path / "copy")
    assert SentenceEncoder(resolve_model(copy)).fingerprint == encoder.fingerprint
    pooling = json.loads((copy / "1_Pooling" / "config.json").read_text())
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_cls_token": True}))
    assert SentenceEncoder(resolve_model(copy)).fingerprint != encoder.fingerprint


def test_the_instruction_is_the_papers() -> None:
    assert INSTRUCTION == "Represent the sentence for similar task retrieval: "


def test_an_adapters_vector_is_the_mean_at_length_one() -> None:
    vector = mean_vector(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    np.testing.assert_allclose(vector, [0.5**0.5] * 2, atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_vector_without_direction_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="without direction"):
        unit(np.array(values))
