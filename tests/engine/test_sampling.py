from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.engine.sampling import TokenSampler, check_sampling, find_stop, safe_length
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Sampling

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0])


def draws(sampling: Sampling, count: int = 300) -> list[int]:
    sampler = TokenSampler(sampling)
    return [sampler.choose(LOGITS, 1) for _ in range(count)]


def test_greedy_takes_the_argmax() -> None:
    assert set(draws(Sampling())) == {1}


def test_a_seed_repeats_and_another_differs() -> None:
    assert draws(Sampling(temperature=1.0, seed=5)) == draws(Sampling(temperature=1.0, seed=5))
    assert draws(Sampling(temperature=1.0, seed=5)) != draws(Sampling(temperature=1.0, seed=6))
    assert draws(Sampling(temperature=1.0)) != draws(Sampling(temperature=1.0))


def test_frequencies_follow_the_softmax() -> None:
    found = draws(Sampling(temperature=2.0, seed=0), count=4000)
    expected = (LOGITS / 2.0).softmax(-1)
    for token in range(4):
        assert found.count(token) / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert set(draws(Sampling(temperature=1.0, top_k=2, seed=0))) == {1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=0.5, seed=0))) == {1}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=0),
        Sampling(temperature=-0.1),
        Sampling(top_p=0.0),
        Sampling(top_p=1.1),
        Sampling(top_k=-1),
        Sampling(stop=("",)),
    ],
)
def test_settings_that_make_no_sense_are_refused(sampling: Sampling) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        check_sampling(sampling)


def test_the_earliest_stop_string_counts() -> None:
    assert find_stop("one two three", ("three", "two")) == 4
    assert find_stop("one", ("two",)) is None


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3).map(tuple))
def test_what_is_shown_early_never_has_to_be_taken_back(text: str, stop: tuple[str, ...]) -> None:
    shown = ""
    for end in range(1, len(text) + 1):
        place = find_stop(text[:end], stop)
        if place is not None:
            assert text[:place].startswith(shown)
            return
        shown = text[: safe_length(text[:end], stop)]
    assert text.startswith(shown)


def test_half_a_character_is_held_back() -> None:
    assert safe_length("caf\N{REPLACEMENT CHARACTER}", ()) == 3
