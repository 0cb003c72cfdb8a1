"""The recommendation on made-up scores: it says what the intervals carry, and nothing more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from lora_hub_sdk.evaluation.intervals import Scores
from lora_hub_sdk.evaluation.recommendation import Recommendation, recommend

TASKS = [f"t{n % 4}" for n in range(400)]
WIDTHS = {"base": 0.0, "perfect": 1.0, "selection": 1.0, "mixture": 3.0, "fusion": 3.0, "selection-ood": 1.0}


def right(share: float, seed: int, count: int = 400) -> list[float | None]:
    """Exact matches, each right with that probability."""
    return [100.0 * hit for hit in np.random.default_rng(seed).random(count) < share]


def advise(
    scores: Mapping[str, Sequence[float | None]],
    seen: Sequence[str] = (),
    unseen: Sequence[str] = (),
    tasks: Sequence[str] = TASKS,
    known: Sequence[str] | None = None,
) -> Recommendation:
    owned = set(tasks) if known is None else known
    return recommend(Scores.of(scores, tasks), seen=seen, unseen=unseen, known=owned, adapters=WIDTHS)


def test_a_clear_winner_is_named_and_the_others_are_worse() -> None:
    found = advise(
        {"base": right(0.05, 0), "perfect": right(0.7, 1), "mixture": right(0.69, 2), "fusion": right(0.3, 3)},
        ["fusion", "mixture"],
    )
    choice = found.seen
    assert (choice.best, set(choice.equals), set(choice.worse)) == ("mixture", set(), {"fusion"})
    assert choice.questions == 400
    assert choice.worse["fusion"].high < 1
    text = found.sentences()[0]
    assert "`mixture` has the highest mean" in text
    assert "Every other strategy that was asked is shown to be worse." in text
    assert "perfect selection): not shown to differ." in text
    assert text.endswith("points: it helps.")
    assert "too few" not in text


def test_those_whose_ratio_may_be_1_are_not_called_worse_and_the_cheaper_is_told() -> None:
    better = right(0.60, 4)
    nearly: list[float | None] = [0.0 if place % 40 == 0 else one for place, one in enumerate(right(0.6, 4))]
    nearly[1::40] = [100.0] * 10
    scores = {"mixture": better, "selection": nearly, "fusion": right(0.2, 5)}
    found = advise(scores, ["selection", "mixture", "fusion"])
    best, other = ("mixture", "selection") if np.mean(better) > np.mean(nearly) else ("selection", "mixture")  # type: ignore[arg-type]
    assert found.seen.best == best
    assert set(found.seen.equals) == {other}
    ratio = found.seen.equals[other]
    assert ratio.low < 1
    assert not ratio.below(1)
    text = found.sentences()[0]
    assert f"Not shown to be worse: `{other}`" in text
    assert ("The fewest adapters of these has `selection`." in text) == (best == "mixture")
    assert "Shown to be worse: `fusion`" in text
    assert "too few" not in text


def test_few_questions_do_not_tell_systems_apart() -> None:
    tasks = ["a", "a", "b", "b"]
    scores = {"mixture": [100.0, 0.0, 100.0, 100.0], "selection": [100.0, 0.0, 0.0, 100.0], "base": [0.0] * 4}
    found = advise(scores, ["mixture", "selection"], tasks=tasks)
    assert set(found.seen.equals) == {"selection"}
    assert "too few questions to tell any of them apart" in found.sentences()[0]


def test_one_question_a_task_tells_nothing_at_all() -> None:
    found = advise(
        {"mixture": [100.0, 100.0], "selection": [0.0, 50.0], "base": [0.0, 0.0]},
        ["mixture", "selection"],
        tasks=["a", "b"],
    )
    text = found.sentences()[0]
    assert set(found.seen.equals) == {"selection"}
    assert "100.0 [?, ?]" in text
    assert "not shown to help (too few questions to tell)" in text


def test_unseen_tasks_are_judged_by_their_own_systems_and_held_against_selection() -> None:
    scores = {"perfect": right(0.9, 6), "selection-ood": right(0.3, 7), "mixture-ood": right(0.6, 8)}
    found = advise(scores, unseen=["selection-ood", "mixture-ood"])
    assert found.seen.best is None
    assert "no strategy has answers" in found.sentences()[0]
    assert found.unseen.best == "mixture-ood"
    assert found.unseen.ratio.low > 1
    assert "of the nearest other adapter alone: more." in found.sentences()[1]
    alone = advise(scores, unseen=["selection-ood"]).sentences()[1]
    assert "It reaches" not in alone


def test_adapters_that_harm_are_told_to_harm() -> None:
    found = advise({"base": right(0.6, 9), "perfect": right(0.6, 10), "mixture": right(0.3, 11)}, ["mixture"])
    text = found.sentences()[0]
    assert text.endswith("points: it harms.")
    assert "(perfect selection): less." in text


def test_systems_are_compared_on_the_questions_that_all_of_them_answered() -> None:
    full = right(0.5, 12)
    # It looks better on its own questions alone, which are the easy ones.
    lucky = [one or None for one in full]
    lucky[:100] = full[:100]
    rare: list[float | None] = [100.0] * 100 + [None] * 300
    found = advise({"mixture": full, "fusion": lucky, "selection": rare}, ["mixture", "fusion", "selection"])
    assert "selection" not in {found.seen.best, *found.seen.equals, *found.seen.worse}
    common = [one for one, other in zip(full, lucky, strict=True) if other is not None]
    assert found.seen.questions == len(common) < 400
    both = {found.seen.best, *found.seen.equals}
    assert both == {"mixture", "fusion"}
    assert {one.value for one in found.seen.equals.values()} == {1.0}


def test_a_tie_goes_to_the_cheaper_one() -> None:
    same = right(0.5, 13)
    assert advise({"mixture": same, "selection": same}, ["mixture", "selection"]).seen.best == "selection"


def test_nothing_answered_and_nothing_right_are_told() -> None:
    found = advise({"mixture": [None] * 400, "base": [0.0] * 400}, ["mixture"])
    assert "no strategy has answers" in found.sentences()[0]
    zero = advise({"mixture": [0.0] * 400, "selection": [0.0] * 400}, ["mixture", "selection"])
    assert set(zero.seen.equals) == {"mixture"}
    assert "too few questions" in zero.sentences()[0]


def test_it_is_json() -> None:
    found = advise({"mixture": [100.0, 100.0], "base": [0.0, 0.0]}, ["mixture"], tasks=["a", "b"])
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["seen"]["best"] == "mixture"
    assert told["seen"]["mean"] == {"value": 100.0, "low": None, "high": None}
    assert told["sentences"] == list(found.sentences())


def test_a_system_that_needs_rows_of_the_tasks_says_so() -> None:
    scores = Scores.of({"smear": right(0.8, 14), "mixture": right(0.2, 15)}, TASKS)
    found = recommend(
        scores, seen=["smear", "mixture"], unseen=[], known=TASKS, adapters={"smear": 10.0}, taught=["smear", "arrow"]
    )
    assert found.seen.taught == {"smear"}
    assert "questions, 10.0 adapters a prompt, taught by rows of the tasks." in found.sentences()[0]


def test_tasks_without_an_adapter_say_nothing_of_those_with_one() -> None:
    half = ["owned"] * 200 + ["orphan"] * 200
    scores: dict[str, list[float | None]] = {
        "mixture": [*[100.0] * 200, *[0.0] * 200],
        "fusion": [*right(0.5, 16, 200), *[100.0] * 200],
    }
    found = advise(scores, ["mixture", "fusion"], tasks=half, known=["owned"])
    assert (found.seen.best, found.seen.questions) == ("mixture", 200)
    assert advise(scores, ["mixture", "fusion"], tasks=half, known=[]).seen.best is None
