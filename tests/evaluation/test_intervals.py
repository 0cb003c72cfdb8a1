"""Means, ratios and differences with their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.intervals import Interval, Scores

TASKS = ["x"] * 30 + ["y"] * 10


def noisy(seed: int, size: int = 40, chance: float = 0.6) -> list[float]:
    return [100.0 * value for value in np.random.default_rng(seed).random(size) < chance]


def same(found: Interval, value: float, low: float, high: float) -> None:
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), nan_ok=True)


def test_a_mean_is_that_of_the_tasks_means() -> None:
    found = Scores.of({"a": [100.0, 0, 50, 20, 30, 10]}, ["x", "x", "y", "y", "y", "y"]).mean("a")
    assert found.value == pytest.approx((50 + 27.5) / 2)


def test_the_bounds_are_those_of_questions_drawn_again_within_their_tasks() -> None:
    row = np.array(noisy(0))
    random, means = np.random.default_rng(5), []
    for _ in range(4000):
        x, y = random.choice(row[:30], 30), random.choice(row[30:], 10)
        means.append((x.mean() + y.mean()) / 2)
    found = Scores.of({"a": list(row)}, TASKS).mean("a")
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=2.0)
    assert found.low < found.value < found.high


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(300):
        tasks = [f"t{place % 5}" for place in range(100)]
        held += (found := Scores.of({"a": noisy(seed, 100)}, tasks, seed=seed).mean("a")).low <= 60 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_differences_and_ratios_are_paired() -> None:
    one = noisy(1)
    better = [min(100.0, value + 1.0) if value == 0 else value - 1 for value in one]
    scores = Scores.of({"a": one, "b": better}, TASKS)
    # Each row moves by one point at most, so the difference cannot, however wide either mean is.
    found = scores.difference("a", "b")
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert scores.mean("a").high - scores.mean("a").low > 20
    same(scores.difference("b", "a"), -found.value, -found.high, -found.low)
    by = scores.ratio("a", "b")
    assert by.value == pytest.approx(scores.mean("a").value / scores.mean("b").value)
    assert 0.95 < by.low <= by.value <= by.high < 1.05


def test_systems_are_compared_on_the_questions_that_both_answered() -> None:
    one, other = noisy(1), noisy(2)
    holes: list[float | None] = [None if place < 12 else value for place, value in enumerate(other)]
    scores = Scores.of({"a": one, "b": holes}, TASKS)
    kept = Scores.of({"a": one[12:], "b": other[12:]}, TASKS[12:])
    assert scores.mean("b") == kept.mean("b")
    assert scores.difference("a", "b") == kept.difference("a", "b")
    assert scores.ratio("b", "a") == kept.ratio("b", "a")
    assert scores.mean("a") != kept.mean("a")


def test_a_task_without_a_common_answer_counts_for_neither() -> None:
    scores = Scores.of({"a": [0.0, 100, 50, 50], "b": [100.0, 100, None, None]}, ["x", "x", "y", "y"])
    assert scores.difference("a", "b").value == -50
    assert scores.ratio("a", "b").value == 0.5


def test_a_cluster_is_told_as_if_it_stood_alone() -> None:
    scores = Scores.of({"a": noisy(3), "b": noisy(4)}, TASKS)
    alone = Scores.of({"a": noisy(3)[:30], "b": noisy(4)[:30]}, TASKS[:30])
    assert scores.within(["x"]).means() == alone.means()
    assert scores.within(["x"]).ratio("a", "b") == alone.ratio("a", "b")


def test_the_same_seed_gives_the_same_bounds_and_another_gives_others() -> None:
    rows = {"a": [value + place for place, value in enumerate(noisy(3))]}
    assert Scores.of(rows, TASKS, seed=1).means() == Scores.of(rows, TASKS, seed=1).means()
    assert Scores.of(rows, TASKS, seed=1).means() != Scores.of(rows, TASKS, seed=2).means()


@pytest.mark.parametrize("row", [[70.0], [100.0] * 5, [0.0] * 5, [33.3] * 7])
def test_what_drawing_again_cannot_tell_has_no_bounds(row: list[float]) -> None:
    found = Scores.of({"a": row}, ["x"] * len(row)).mean("a")
    same(found, row[0], math.nan, math.nan)
    assert not found.is_known
    assert not found.above(-1)
    assert not found.below(101)
    assert found.as_dict() == {"value": found.value, "low": None, "high": None}


def test_a_shift_of_every_question_has_no_bounds_either() -> None:
    one = [value + 0.1 * place for place, value in enumerate(noisy(1))]
    found = Scores.of({"a": one, "b": [value + 0.7 for value in one]}, TASKS).difference("b", "a")
    same(found, 0.7, math.nan, math.nan)


def test_one_question_of_each_task_gives_a_mean_and_no_bounds() -> None:
    same(Scores.of({"a": [0.0, 100.0]}, ["x", "y"]).mean("a"), 50, math.nan, math.nan)


def test_no_answer_at_all_is_told_as_such() -> None:
    scores = Scores.of({"a": [None, math.nan], "b": [1.0, 2.0]}, ["x", "x"])
    for found in (scores.mean("a"), scores.difference("a", "b"), scores.ratio("b", "a"), scores.within([]).mean("b")):
        assert math.isnan(found.value)
        assert found.as_dict() == {"value": None, "low": None, "high": None}


def test_a_ratio_to_nothing_is_none_and_near_to_nothing_has_no_upper_bound() -> None:
    scores = Scores.of({"a": noisy(1, 20), "zero": [0.0] * 20, "low": [100.0] + [0.0] * 19}, ["x"] * 20)
    assert math.isnan(scores.ratio("a", "zero").value)
    assert scores.ratio("zero", "a").value == 0
    found = scores.ratio("a", "low")
    assert found.value > 5
    assert found.low > 1
    assert math.isnan(found.high), "in a third of the draws the denominator is 0"
    assert found.above(1)
    assert not found.is_known


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("xyz"), st.one_of(st.none(), st.floats(0, 100)), st.one_of(st.none(), st.floats(0, 100))
        )
    )
)
def test_bounds_lie_around_their_value_or_are_not_known(rows: list[tuple[str, float | None, float | None]]) -> None:
    scores = Scores.of({"a": [a for _, a, _ in rows], "b": [b for _, _, b in rows]}, [task for task, *_ in rows])
    for found in (scores.mean("a"), scores.difference("a", "b"), scores.ratio("a", "b")):
        if found.is_known:
            assert found.low <= found.high
            assert math.isfinite(found.value)
    mean = scores.mean("a")
    assert not mean.value < 0
    assert not mean.value > 100 + 1e-9


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="system 'a' has 2 scores for 1 questions"):
        Scores.of({"a": [1.0, 2.0]}, ["x"])
    with pytest.raises(ConfigurationError, match=r"expected \(1, 3\)"):
        Scores(np.zeros((1, 2)), ("a",), ("x", "x", "x"))
    with pytest.raises(ConfigurationError, match="no scores of system 'b'; there are a"):
        Scores.of({"a": [1.0]}, ["x"]).mean("b")
