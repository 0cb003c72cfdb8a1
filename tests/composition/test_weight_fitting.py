from __future__ import annotations

import math

import numpy as np
import pytest

from lora_hub_sdk.composition.weight_fitting import fit_weights
from lora_hub_sdk.composition.weighting import WEIGHTINGS, WeightRule, entmax, softmax
from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.retriever.held_out import HeldOut


def drawn(count: int, seed: int = 0, *, adapters: int = 40, k: int = 3) -> HeldOut:
    """Searches whose right hit is drawn with the probabilities softmax(25 c + 8 o)."""
    rng = np.random.default_rng(seed)
    cosines = -np.sort(-rng.normal(0.4, 0.08, (count, k)), axis=1)
    words = rng.uniform(0, 0.5, (count, k))
    odds = softmax(25 * cosines + 8 * words).cumsum(axis=1)
    right = np.eye(k, dtype=bool)[(rng.uniform(size=(count, 1)) > odds).sum(axis=1)]
    return HeldOut(cosines, words, right, rng.integers(adapters, size=count))


def likelihood(held: HeldOut, weights: np.ndarray) -> float:
    return float(np.log((weights * held.right).sum(axis=1)).mean())


def test_the_fitted_temperature_has_the_greatest_likelihood() -> None:
    held = drawn(2000)
    rule = fit_weights(held, k=3).rule
    best = likelihood(held, softmax(rule.fitted * held.cosines))
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert likelihood(held, softmax(factor * rule.fitted * held.cosines)) < best
    assert 15 < rule.fitted < 30


def test_the_sparse_factor_has_the_least_loss_of_its_own_kind() -> None:
    held = drawn(2000)

    def loss(cosine: float, words: float = 0.0) -> float:
        scores = cosine * held.cosines + words * held.words
        weights = entmax(scores)
        conjugate = (weights * scores).sum(axis=1) - ((weights**1.5).sum(axis=1) - 1) / 0.75
        return float((conjugate - (held.right * scores).sum(axis=1)).mean())

    rule = fit_weights(held, k=3).rule
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert loss(factor * rule.sparse) > loss(rule.sparse)
        for cosine, words in ((factor, 1), (1, factor), (factor, 1 / factor)):
            gate = rule.gate_cosine, rule.gate_words
            assert loss(cosine * gate[0], words * gate[1]) > loss(*gate)


def test_the_gate_finds_how_much_words_count_beside_cosines() -> None:
    found = fit_weights(drawn(4000), k=3)
    assert found.rule.gate_words / found.rule.gate_cosine == pytest.approx(8 / 25, rel=0.15)
    scores = found.scores
    assert scores["gate"].owner.low > scores["fitted"].owner.high > scores["similarity"].owner.high
    assert list(scores) == list(WEIGHTINGS)
    assert scores["uniform"].log_likelihood.value == pytest.approx(math.log(1 / 3))
    assert scores["uniform"].used.value == 3 > scores["sparse"].used.value


def test_scores_that_tell_nothing_leave_the_weights_alike() -> None:
    rng = np.random.default_rng(0)
    cosines = np.sort(rng.normal(0.4, 0.05, (300, 3)), axis=1)[:, ::-1]
    least = np.tile([False, False, True], (300, 1))  # the last is right, so every factor would be below 0
    rule = fit_weights(HeldOut(cosines, cosines * 0, least, np.arange(300) % 10), k=3).rule
    assert rule == WeightRule(0.0, 0.0, 0.0, 0.0, rule.words_base, rule.words_slope)


def test_a_right_adapter_that_always_stands_out_gets_nearly_all_and_the_numbers_stay_finite() -> None:
    rng = np.random.default_rng(0)
    cosines = np.array([0.8, 0.3, 0.2]) + rng.normal(0, 0.01, (200, 3))
    right = np.tile([True, False, False], (200, 1))
    found = fit_weights(HeldOut(cosines, cosines * np.nan, right, np.arange(200) % 8), k=3)
    for name in ("fitted", "sparse", "gate"):
        assert found.scores[name].owner.value > 0.99
    assert found.rule.fitted < 1000
    assert found.scores["sparse"].used.value == 1


def test_twins_that_are_right_together_share() -> None:
    """Both have the same content: their cosines differ by chance alone, so no factor can be large."""
    rng = np.random.default_rng(0)
    cosines = np.concatenate([rng.normal(0.6, 0.05, (400, 2)), rng.normal(0.2, 0.05, (400, 1))], axis=1)
    twins = np.tile([True, True, False], (400, 1))
    rule = fit_weights(HeldOut(cosines, cosines * np.nan, twins, np.arange(400) % 8), k=3).rule
    for name in ("fitted", "sparse"):
        first, second, other = rule.weights(name, [0.62, 0.58, 0.2], [np.nan] * 3)
        assert 0.3 < second < first < 0.7
        assert other < 0.05


def test_a_learned_weighting_is_measured_on_adapters_that_it_was_not_fitted_on() -> None:
    """Ten adapters that are found first, and ten whose searches find another: nothing to learn for either from them."""
    cosines = np.tile([0.6, 0.5], (200, 1))
    right = np.array([[True, False], [False, True]])[(np.arange(200) % 20 >= 10).astype(int)]
    found = fit_weights(HeldOut(cosines, cosines * np.nan, right, np.arange(200) % 20), k=2)
    assert found.scores["fitted"].log_likelihood.value <= math.log(0.5) + 1e-9
    assert found.scores["fitted"].top.value == 0.5


def test_without_rivals_there_is_nothing_to_learn() -> None:
    alone = HeldOut(
        np.array([[0.5, -np.inf]] * 4), np.full((4, 2), np.nan), np.array([[True, False]] * 4), np.arange(4)
    )
    with pytest.raises(SamplesError, match="two or more"):
        fit_weights(alone, k=2)
    missed = HeldOut(np.array([[0.5, 0.4]] * 4), np.full((4, 2), np.nan), np.zeros((4, 2), dtype=bool), np.arange(4))
    with pytest.raises(SamplesError):
        fit_weights(missed, k=2)


def test_few_rows_are_told_and_a_missing_hit_hurts_nobody() -> None:
    held = drawn(30, adapters=2)
    held.cosines[::2, 2], held.right[::2, 2] = -np.inf, False
    found = fit_weights(held, k=3)
    assert "only 30 samples" in found.warnings[0]
    assert found.adapters == 2
    assert found.found < 1
    assert found.scores["uniform"].used.value == 2.5
    assert found.as_dict()["scores"]["gate"]["owner"]["low"] >= 0
