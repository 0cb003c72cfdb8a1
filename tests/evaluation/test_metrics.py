"""How good an answer is, in percent."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError
from lora_hub_sdk.evaluation import metrics
from lora_hub_sdk.evaluation.metrics import METRICS, corpus_bleu, normalised, score, scores

ALL = st.sampled_from(sorted(METRICS))
#: Any text, and texts that share words.
TEXTS = st.text() | st.lists(st.sampled_from(["the", "a", "Cat", "sat", "on", "mat", ".", "дом", "猫"])).map(" ".join)


@given(metric=ALL, answer=TEXTS, target=TEXTS)
def test_every_score_is_a_percentage(metric: str, answer: str, target: str) -> None:
    found = scores(metric, answer, target)
    assert all(0 <= value <= 100 for value in found.values())
    assert score(metric, answer, target) == found[METRICS[metric].name]


@given(metric=ALL, text=TEXTS)
def test_the_wanted_answer_has_all_of_it(metric: str, text: str) -> None:
    assert all(value == pytest.approx(100) for value in scores(metric, text, text).values())


@given(answer=TEXTS, target=TEXTS)
def test_f1_is_symmetric_and_exact_matches_have_all_of_it(answer: str, target: str) -> None:
    assert score("f1", answer, target) == score("f1", target, answer)
    if score("em", answer, target) == 100:
        assert score("f1", answer, target) == 100


@given(text=TEXTS)
def test_normalising_again_changes_nothing_and_nothing_becomes_empty(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
    assert bool(normalised(text)) == bool(text.strip())


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("The  Cat.", "cat", True),
        ("an answer\n", "Answer!", True),
        ("don\u2019t", "don't", True),
        ("$1,000.", "1000", True),
        ("«Привет, мир»", "привет мир", True),
        ("STRASSE", "straße", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("好。", "好", True),
        ("the cat", "the cats", False),
        ("Привет", "Пока", False),
        ("...", "", False),
        ("...", "?", False),
        ("", "the", False),
        ("(A)", "A", True),
        ("A", "the", False),
        ("A", "", False),
        ("3.5", "35", False),
        ("$3.5.", "3.5", True),
        (".5", "5", False),
        ("(-.5)", "-.5", True),
        ("-2", "2", False),
        ("\u22122", "-2", True),
        ("2-3", "23", True),
        ("नमस्ते।", "नमस्ते", True),
    ],
)
def test_exact_match_is_of_words_not_of_marks(answer: str, target: str, same: bool) -> None:
    assert score("em", answer, target) == 100.0 * same


def test_f1_counts_words_as_often_as_they_come() -> None:
    # Two of three words given are among the four that are wanted.
    assert score("f1", "red red blue", "the red red green sky") == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert score("f1", "东京塔", "东京") == pytest.approx(100 * 2 * 2 / (3 + 2)), "no spaces, so characters count"


@given(
    answer=st.text(st.characters(codec="ascii")),
    target=st.lists(st.sampled_from(["cat", "sat", "mat."]), min_size=2).map(" ".join),
)
def test_rouge_of_english_is_that_of_the_library_without_stemming(answer: str, target: str) -> None:
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).score(target, answer)
    if plain["rouge1"].fmeasure:  # without any word there is nothing that the library could count
        assert scores("rouge", answer, target) == {kind: 100 * found.fmeasure for kind, found in plain.items()}


@pytest.mark.parametrize("text", ["кошка сидит на коврике", "मेरा नाम राम है", "γάτα και σκύλος εδώ", "猫が座る"])
def test_rouge_counts_words_of_any_script(text: str) -> None:
    half = text[: len(text) // 2]
    assert 0 < score("rouge1", half, text) < 100
    assert 0 < score("rougeL", half, text) < 100


def test_a_word_alone_has_no_pair_and_still_is_right() -> None:
    assert scores("rouge2", "Cat", "cat") == {"rouge1": 100, "rouge2": 100, "rougeL": 100}
    assert scores("rouge", "Cat", "cat dog")["rouge2"] == 0
    assert score("rouge", "...", "?") == 0


def test_bleu_of_a_sentence_is_that_of_the_library_with_the_orders_that_it_has() -> None:
    wanted = "Der Hund schläft heute lange im Garten ."
    for answer in ("Der Hund schläft.", "Der Hund schläft heute im Garten.", "Katze"):
        plain = BLEU(tokenize="13a", effective_order=True).sentence_score(answer, [wanted]).score
        assert score("bleu", answer, wanted) == plain
    assert score("bleu", "Ja", "Ja") == pytest.approx(100), "one word has no fourgrams"
    assert score("bleu", "", "Ja") == score("bleu", "Ja", " ") == 0


def test_bleu_of_the_corpus_counts_all_sentences_together() -> None:
    answers, wanted = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog barks at the door"]
    assert corpus_bleu(answers, wanted) == BLEU().corpus_score(answers, [wanted]).score
    assert corpus_bleu(wanted, wanted) == pytest.approx(100)
    assert math.isnan(corpus_bleu([], []))
    with pytest.raises(ConfigurationError, match="1 answers for 2 targets"):
        corpus_bleu(["a"], ["a", "b"])


@pytest.mark.parametrize("metric", ["accuracy", "", "EM"])
def test_an_unknown_metric_is_told_with_those_that_are_known(metric: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is unknown; known metrics are em, rouge1, .*bleu, f1"):
        score(metric, "a", "b")


@pytest.mark.parametrize(
    ("metric", "package"), [("rouge", "rouge_score.rouge_scorer"), ("bleu", "sacrebleu.metrics.bleu")]
)
def test_a_missing_package_is_told_with_how_to_install_it(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in (metrics._rouge_scorer, metrics._bleu):
        made.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"lora-hub-sdk\[evaluation\]"):
        score(metric, "a", "b")
    assert score("em", "a", "a") == 100
