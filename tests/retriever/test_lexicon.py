"""N-grams, profiles and likeness: against counting by hand, in any script, and bounded for any text."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub_sdk.retriever.lexicon import Profile, grams, likeness, profile

WORDS = st.lists(st.sampled_from(["red", "green", "blue", "one", "two", "?", "!"]), max_size=9).map(" ".join)


def some(*texts: str) -> Profile:
    found = profile(texts)
    assert found is not None
    return found


def runs(text: str) -> set[tuple[str, ...]]:
    """The same n-grams, spelled out; the texts here part at spaces."""
    words = text.split()
    return {tuple(words[start : start + n]) for n in (1, 2, 3) for start in range(len(words) - n + 1)}


@settings(deadline=None)
@given(WORDS, WORDS)
def test_two_texts_share_as_many_grams_as_runs_of_words(one: str, other: str) -> None:
    assert len(grams(one)) == len(runs(one))
    assert len(np.intersect1d(grams(one), grams(other))) == len(runs(one) & runs(other))


@settings(deadline=None)
@given(
    st.lists(WORDS.filter(bool), min_size=1, max_size=4), st.lists(WORDS.filter(bool), min_size=1, max_size=4), WORDS
)
def test_likeness_is_what_its_definition_says(first: list[str], second: list[str], prompt: str) -> None:
    counted = [Counter(run for text in texts for run in runs(text)) for texts in (first, second)]
    samples = [len(first), len(second)]
    expected = []
    for counts, own in zip(counted, samples, strict=True):
        norm = math.sqrt(sum(count * (count - 0.9) for count in counts.values())) / own
        shared = 0.0
        for run in runs(prompt):
            weight = math.log((sum(samples) + 1) / (sum(others[run] for others in counted) + 1)) + 1
            shared += counts[run] / own * weight**2
        expected.append(shared / norm)
    assert likeness(grams(prompt), [some(*first), some(*second)]) == pytest.approx(expected, rel=1e-5)


def test_a_profile_counts_samples_and_not_occurrences() -> None:
    found = some("yes yes yes", "yes")
    counts = dict(zip(found.grams.tolist(), found.counts.tolist(), strict=True))
    assert counts[int(grams("yes")[0])] == 2
    assert found.samples == 2
    assert found.norm == pytest.approx(math.sqrt(1 + 0.25 + 0.25))
    assert np.all(np.diff(found.grams.astype(object)) > 0)


def test_case_and_width_of_letters_do_not_count() -> None:
    assert (
        grams("Is it TRUE?").tolist()
        == grams("is it true?").tolist()
        == grams("\uff49\uff53 it \uff34rue\uff1f").tolist()
    )
    assert grams("Straße").tolist() == grams("STRASSE").tolist()
    assert grams("cafe\u0301").tolist() == grams("caf\u00e9").tolist()


@pytest.mark.parametrize(
    ("sample", "prompt", "other"),
    [
        ("把这句话翻译成英文", "请翻译成英文", "今天天气怎么样"),
        ("この文を英語に訳してください", "英語に訳して", "明日は何時ですか"),
        ("แปลประโยคนี้เป็นภาษาอังกฤษ", "ช่วยแปลเป็นภาษาอังกฤษ", "วันนี้อากาศดีไหม"),
    ],
)
def test_scripts_without_spaces_are_alike_where_they_share_words(sample: str, prompt: str, other: str) -> None:
    near, far = likeness(grams(prompt), [some(sample), some(other)])
    assert near > 2 * far


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_a_text_without_words_has_no_grams(text: str) -> None:
    assert grams(text).shape == (0,)
    assert grams(text).dtype == np.uint64


def test_samples_without_words_have_no_profile() -> None:
    assert profile([]) is None
    assert profile(["", "  "]) is None
    assert some("", "yes").samples == 1


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=60))
def test_any_text_is_read(text: str) -> None:
    found = grams(text)
    assert found.tolist() == sorted(set(found.tolist()))


def test_lone_surrogates_are_read() -> None:
    assert len(grams("\ud800 yes \udfff")) > 0


@pytest.mark.parametrize("piece", ["word ", "x", "漢字仮名", "ก\u0e33า", ". ", "\ufdfa"])
def test_a_long_text_is_read_at_both_ends_and_costs_no_more_for_its_middle(piece: str) -> None:
    middle = piece * (100_000 // len(piece))
    text = f"Translate the following text. {middle} Answer in one word:"
    assert np.isin(grams("Translate the following text."), grams(text)).all()
    assert np.isin(grams("Answer in one word:"), grams(text)).all()
    unlike = "".join(f"{number} " for number in range(20_000))
    assert len(grams(unlike)) < 3 * 1100


def test_what_all_candidates_say_tells_little() -> None:
    """Both say "question :"; one of them asks for a capital in one of its two samples."""
    first, second = (
        some("question : name the capital", "question : name a river"),
        some("question : add two", "question : x y"),
    )
    common = likeness(grams("question :"), [first, second])
    assert common[0] == pytest.approx(common[1], rel=0.35)
    rare = likeness(grams("capital"), [first, second])
    assert (rare[0] > 0, rare[1]) == (True, 0.0)


def test_one_sample_counts_as_no_less_than_many_for_the_same_wording() -> None:
    """By the plain norm, that of all its words, one sample would stand far behind many of the same wording."""
    content = ["the red house", "a green boat", "my blue tree", "one old dog", "two new cats", "his big car"]
    many = some(*(f"classify this text : {text}" for text in content))
    one = some("classify this text : the white bird")
    few, most = likeness(grams("classify this text : some other thing"), [one, many])
    assert few / most > (1 / one.norm) / (1 / many.norm) * 1.3


def test_no_candidates_and_no_words_are_no_error() -> None:
    assert likeness(grams("yes"), []).shape == (0,)
    assert likeness(grams(""), [some("yes"), some("no")]).tolist() == [0.0, 0.0]


def test_a_profile_of_twenty_samples_is_small() -> None:
    texts = [" ".join(f"w{row}-{place}" for place in range(45)) for row in range(20)]
    assert some(*texts).size_bytes < 64 << 10
