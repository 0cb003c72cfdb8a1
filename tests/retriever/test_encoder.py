from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import INSTRUCTION, SentenceEncoder, front_and_end, mean_vector, unit
from lora_hub_sdk.retriever.settings import SETTINGS_FILE, RetrieverSettings, write_settings

#: 64 tokens, half of them from the end: what the paper's data likes best.
_SHORT = RetrieverSettings(max_tokens=64, tail_tokens=32)


@pytest.fixture(scope="module")
def short() -> SentenceEncoder:
    return SentenceEncoder(resolve_model("all-minilm-l6-v2"), settings=_SHORT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A plain encoder's folder, to be changed."""
    return shutil.copytree(resolve_model("all-minilm-l6-v2").folder, tmp_path / "copy")


def fingerprint(folder: Path, settings: RetrieverSettings | None = None) -> str:
    return SentenceEncoder(resolve_model(folder), settings=settings).fingerprint


def test_vectors_have_length_one_and_follow_meaning(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["Translate to French: good day", "Übersetze: guten Tag", "What is 3 + 4?"])
    assert vectors.shape == (3, encoder.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_a_text_has_one_vector_whatever_its_neighbours(encoder: SentenceEncoder) -> None:
    fresh = SentenceEncoder(resolve_model("all-minilm-l6-v2"), cache_bytes=0)
    texts = ["short", "", "日本語の文 and מילים", "a much longer text " * 30, "middling " * 9]
    together = fresh.encode(texts)
    alone = np.concatenate([fresh.encode([text]) for text in texts])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts), together, atol=1e-5)


def test_no_texts_give_no_vectors(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.parametrize(
    "text", ["a" * 3_000_000, "\N{GRINNING FACE}" * 5000, "\0", "", "\ud800 half", "日本語の文", "مرحبا بالعالم"]
)
def test_huge_and_foreign_texts_are_encoded(encoder: SentenceEncoder, text: str) -> None:
    assert np.isfinite(encoder.encode([text])).all()


def test_the_fingerprint_names_weights_configuration_and_instruction(encoder: SentenceEncoder, copy: Path) -> None:
    resolved = resolve_model("all-minilm-l6-v2")
    assert SentenceEncoder(resolved).fingerprint == encoder.fingerprint
    assert SentenceEncoder(resolved, instruction="").fingerprint != encoder.fingerprint
    assert fingerprint(copy) == encoder.fingerprint
    pooling = json.loads((copy / "1_Pooling" / "config.json").read_text())
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_cls_token": True}))
    assert fingerprint(copy) != encoder.fingerprint


def test_the_embedded_encoder_keeps_the_fingerprint_that_registries_know(encoder: SentenceEncoder) -> None:
    assert encoder.fingerprint == "66ed0a4890530995f179076b5dca9255efb1b4eac1292f7cf7f5882c2b31cce3"


def test_the_fingerprint_names_what_is_read_of_a_text_and_nothing_that_vectors_do_not_hang_on(copy: Path) -> None:
    plain = RetrieverSettings()
    same = [
        plain,
        RetrieverSettings(rerank=True, min_score=0.5),
        RetrieverSettings(max_tokens=256),  # the model reads no more anyway
        RetrieverSettings(max_tokens=9000),
    ]
    others = [RetrieverSettings(max_tokens=128), _SHORT, RetrieverSettings(tail_tokens=32)]
    assert {fingerprint(copy, settings) for settings in same} == {fingerprint(copy)}
    assert len({fingerprint(copy, settings) for settings in [plain, *others]}) == 4
    write_settings(copy, _SHORT)
    assert fingerprint(copy) == fingerprint(copy, _SHORT)


def test_a_limit_that_only_the_tokenizer_tells_is_in_the_fingerprint(copy: Path) -> None:
    # sentence-transformers 6 saves it there; two such folders may have the very same weights.
    (copy / "sentence_bert_config.json").write_text("{}")
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    found = set()
    for tokens in (64, 128):
        (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": tokens}))
        found.add(fingerprint(copy))
    assert len(found) == 2
    assert fingerprint(copy, RetrieverSettings(max_tokens=64)) in found


def test_the_folder_tells_instruction_and_length(copy: Path) -> None:
    write_settings(copy, RetrieverSettings(instruction="Task: ", max_tokens=24, rerank=True, min_score=0.4))
    trained = SentenceEncoder(resolve_model(copy))
    assert trained.settings.rerank
    spelled = SentenceEncoder(resolve_model(copy), settings=RetrieverSettings(instruction="", max_tokens=24))
    np.testing.assert_allclose(trained.encode(["2 + 2"]), spelled.encode(["Task: 2 + 2"]), atol=1e-6)
    np.testing.assert_allclose(trained.encode(["one " * 30]), trained.encode(["one " * 30 + "two"]), atol=1e-6)


def test_another_instruction_than_the_folders_drops_the_score_that_was_calibrated_with_it(copy: Path) -> None:
    write_settings(copy, RetrieverSettings(instruction="Task: ", rerank=True, min_score=0.4))
    resolved = resolve_model(copy)
    assert SentenceEncoder(resolved, instruction="Task: ").settings.min_score == 0.4
    assert SentenceEncoder(resolved, instruction="Other: ").settings == RetrieverSettings("Other: ", rerank=True)


def test_damaged_settings_are_told_before_anything_is_loaded(copy: Path) -> None:
    (copy / SETTINGS_FILE).write_text("{")
    with pytest.raises(ConfigurationError, match=SETTINGS_FILE):
        SentenceEncoder(resolve_model(copy))


@pytest.mark.parametrize(
    "settings",
    [RetrieverSettings(max_tokens=8), replace(_SHORT, tail_tokens=60), RetrieverSettings(instruction="word " * 300)],
)
def test_settings_that_leave_no_room_for_a_text_are_refused(settings: RetrieverSettings) -> None:
    with pytest.raises(ConfigurationError, match="leaves none for the front of a text"):
        SentenceEncoder(resolve_model("all-minilm-l6-v2"), settings=settings).encode(["text"])


def test_the_end_of_a_long_text_is_read_where_the_settings_say_so(
    encoder: SentenceEncoder, short: SentenceEncoder
) -> None:
    story = "It was raining, and the two of them walked home along the river. " * 2000  # 130,000 characters
    questions = ["Translate this story into Portuguese.", "How many people are there? Answer with a number."]
    front = encoder.encode([story + question for question in questions])
    both = short.encode([story + question for question in questions])
    np.testing.assert_allclose(front[0], front[1], atol=1e-6)
    assert both[0] @ both[1] < 0.9
    asked = short.encode(questions)
    assert (both @ asked.T).argmax(axis=1).tolist() == [0, 1]


def test_a_text_that_the_model_reads_whole_is_not_cut(encoder: SentenceEncoder, short: SentenceEncoder) -> None:
    texts = ["What is 3 + 4?", "", "A sentence of some twenty words, which is well below what would have to be cut."]
    np.testing.assert_allclose(short.encode(texts), encoder.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    "text", ["unbelievably " * 99, "日本語の文" * 99, "x1-" * 99, "😀 " * 99, "ü " * 99, ("0a" * 40 + " ") * 9]
)
def test_front_and_end_together_fit(short: SentenceEncoder, text: str) -> None:
    tokenizer = short._loaded().tokenizer
    cut = front_and_end(tokenizer, f"first {text} the last", 64, 32)
    assert cut.startswith("first ")
    assert cut.endswith(" the last")
    assert 56 <= len(tokenizer(cut, verbose=False)["input_ids"]) <= 64


def test_a_text_that_comes_again_is_not_encoded_again() -> None:
    encoder = SentenceEncoder(resolve_model("all-minilm-l6-v2"))
    first = encoder.encode(["one", "two", "one"])
    assert (encoder.cache_use.hits, encoder.cache_use.misses, encoder.cache_use.texts) == (0, 3, 2)
    np.testing.assert_array_equal(first[0], first[2])
    first[:] = 0  # the caller's own
    again = encoder.encode(["two", "three"])
    assert (encoder.cache_use.hits, encoder.cache_use.misses) == (1, 4)
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1.0, atol=1e-5)


def test_threads_get_the_vectors_of_their_own_texts(encoder: SentenceEncoder) -> None:
    own = SentenceEncoder(resolve_model("all-minilm-l6-v2"), cache_bytes=20_000)  # ten vectors: many are dropped
    texts = [f"text number {number}" for number in range(40)]
    right = encoder.encode(texts)
    found: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}

    def work(start: int) -> Callable[[], None]:
        def run() -> None:
            found[start] = own.encode(texts[start:] + texts[:start])

        return run

    threads = [threading.Thread(target=work(start)) for start in range(0, 40, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    for start, vectors in found.items():
        np.testing.assert_allclose(vectors, np.roll(right, -start, axis=0), atol=1e-5)


def test_the_instruction_is_the_papers() -> None:
    assert INSTRUCTION == "Represent the sentence for similar task retrieval: "


def test_an_adapters_vector_is_the_mean_at_length_one() -> None:
    vector = mean_vector(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    np.testing.assert_allclose(vector, [0.5**0.5] * 2, atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_vector_without_direction_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="without direction"):
        unit(np.array(values))
