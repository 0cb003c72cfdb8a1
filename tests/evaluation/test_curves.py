"""Quality against k, from made-up answers."""

from __future__ import annotations

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.answers import Answer
from lora_hub_sdk.evaluation.curves import curve_systems, quality_curves


def answers(system: str, *scores: float | None) -> list[Answer]:
    """To questions of two tasks in turn."""
    return [
        Answer(system, place, f"t{place % 2}", "d", "em", text="x", score=score) for place, score in enumerate(scores)
    ]


def test_the_systems_of_the_figure_are_named_by_strategy_and_k() -> None:
    assert curve_systems((2, 1)) == tuple(
        f"{name}@{k}" for name in ("mixture", "fusion", "mixture-ood", "fusion-ood") for k in (1, 2)
    )
    assert len(curve_systems()) == 32
    with pytest.raises(ConfigurationError, match="k=0"):
        curve_systems((0, 1))


def test_a_curve_goes_through_the_means_over_tasks_with_their_intervals() -> None:
    found = quality_curves(
        [
            *answers("mixture@1", 100, 0, 0, 0, 100, 100),
            *answers("mixture@10", 100, 100, 0, 100, 100, 0),
            *answers("mixture@2", 100, 0, 100, 0, 100, 100),
            *answers("perfect", 0, 0, 0, 0, 0, 0),
        ]
    )
    (curve,) = found
    assert curve.name == "mixture"
    assert curve.x == [1, 2, 10]
    assert curve.y == pytest.approx([50, 200 / 3, 200 / 3])
    assert curve.low is not None
    assert curve.high is not None
    assert all(low < y < high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))


def test_selection_is_the_first_point_and_the_default_the_third_of_both_strategies() -> None:
    names = ("selection", "mixture", "fusion", "selection-ood", "mixture-ood")
    found = quality_curves([one for place, name in enumerate(names) for one in answers(name, 10 * place, 10 * place)])
    assert [(curve.name, curve.x, curve.y) for curve in found] == [
        ("mixture", [1, 3], [0, 10]),
        ("fusion", [1, 3], [0, 20]),
        ("mixture, own adapter left out", [1, 3], [30, 40]),
    ]
    # One question a task, or the same score everywhere, says nothing of how sure that is.
    assert all(curve.low is None and curve.high is None for curve in found)


def test_only_questions_count_that_all_points_stand_for() -> None:
    # Without an own adapter to leave out, the second task has no answer out of distribution.
    given = [
        *answers("mixture@1", 100, 0, 100, 0),
        *answers("mixture@2", 80, 0, 80, 0),
        *answers("mixture-ood@1", 60, None, 60, None),
        *answers("mixture-ood@2", 40, None, 40, None),
    ]
    assert [list(curve.y) for curve in quality_curves(given)] == [[100, 80], [60, 40]]


def test_one_k_is_no_curve() -> None:
    assert quality_curves([*answers("mixture@2", 1, 2), *answers("fusion@2", 3, 4)]) == []


def test_points_that_share_no_question_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"mixture@1, mixture@2"):
        quality_curves([*answers("mixture@1", 1, None), *answers("mixture@2", None, 2)])
