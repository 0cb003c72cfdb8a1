from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.composition.weighting import LEARNED, WeightRule, entmax, similarity, softmax, uniform
from lora_hub_sdk.errors import ConfigurationError

RULE = WeightRule(20.0, 10.0, 10.0, 5.0, 0.1, 0.5)
LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=9)


def by_bisection(logits: list[float]) -> np.ndarray:
    """1.5-entmax by its definition: the threshold is found by halving, without any sorting."""
    halves = np.array(logits) / 2
    low, high = halves.max() - 1, halves.max()
    for _ in range(200):
        middle = (low + high) / 2
        if (np.maximum(halves - middle, 0) ** 2).sum() < 1:
            high = middle
        else:
            low = middle
    return np.asarray(np.maximum(halves - low, 0) ** 2)


@given(LOGITS)
def test_entmax_is_what_its_definition_says(logits: list[float]) -> None:
    assert entmax(logits) == pytest.approx(by_bisection(logits), abs=1e-7)


@given(LOGITS, st.floats(-5, 5))
def test_both_maps_give_distributions_in_the_order_of_the_logits_wherever_these_start(
    logits: list[float], shift: float
) -> None:
    for weigh in (softmax, entmax):
        weights = weigh(logits)
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        order = np.argsort(logits, kind="stable")
        assert (np.diff(weights[order]) >= -1e-12).all()
        assert weigh(np.array(logits) + shift) == pytest.approx(weights, abs=1e-6)


def test_entmax_drops_what_is_two_logits_behind_and_softmax_never_does() -> None:
    assert list(entmax([2.0, 0.0, -1.0])) == [1, 0, 0]
    assert (entmax([1.9, 0.0]) > 0).all()
    assert (softmax([30.0, 0.0]) > 0).all()


@pytest.mark.parametrize("name", LEARNED)
def test_rows_are_weighed_one_by_one_and_gaps_get_nothing(name: str) -> None:
    cosines = np.array([[0.6, 0.55, 0.5], [0.4, 0.39, -np.inf]])
    words = np.array([[0.2, 0.3, np.nan], [0.1, 0.1, np.nan]])
    found = RULE.weights(name, cosines, words)
    assert found[0] == pytest.approx(RULE.weights(name, cosines[0], words[0]))
    assert found[1, :2] == pytest.approx(RULE.weights(name, cosines[1, :2], words[1, :2]))
    assert found[1, 2] == 0
    flat = WeightRule(0.0, 0.0, 0.0, 0.0, 0.0, 0.0).weights(name, cosines, words)
    assert flat == pytest.approx(np.array([[1 / 3] * 3, [0.5, 0.5, 0]]))


def test_the_learned_weightings_follow_their_formulas() -> None:
    cosines, words = [0.50, 0.45], [0.1, 0.3]
    fitted = RULE.weights("fitted", cosines, words)
    assert fitted[0] / fitted[1] == pytest.approx(math.exp(20 * 0.05))
    assert RULE.temperature == 0.05
    assert RULE.weights("sparse", cosines, words) == pytest.approx(entmax([5.0, 4.5]))
    assert RULE.weights("gate", cosines, words) == pytest.approx(entmax([5.0 + 0.5, 4.5 + 1.5]))


def test_a_weight_below_a_hundredth_goes_to_the_others() -> None:
    assert 0 < entmax([9.9, 8.0])[1] < 0.01
    for name in ("sparse", "gate"):
        assert list(RULE.weights(name, [0.99, 0.80], [0.5, 0.5])) == [1, 0]


def test_an_adapter_whose_samples_were_kept_back_counts_as_others_of_its_cosine() -> None:
    known = RULE.weights("gate", [0.6, 0.5], [0.25, 0.1 + 0.5 * 0.5])
    assert RULE.weights("gate", [0.6, 0.5], [0.25, np.nan]) == pytest.approx(known)


def test_uniform_and_similarity_are_as_ever() -> None:
    assert uniform([0.9, 0.1]) == [0.5, 0.5]
    first, second = similarity([0.5, 0.3])
    assert first / second == pytest.approx(math.e)


def test_a_rule_survives_as_text_and_refuses_what_is_no_number() -> None:
    assert WeightRule.of_text(RULE.as_text()) == RULE
    assert WeightRule(0, 0, 0, 0, -1, -1).temperature == math.inf
    for wrong in (float("nan"), float("inf"), -1.0, True, "1"):
        with pytest.raises(ConfigurationError, match="sparse"):
            WeightRule(1.0, wrong, 1.0, 1.0, 0.0, 0.0)  # type: ignore[arg-type]
