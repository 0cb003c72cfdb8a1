"""Which texts meet in which training step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.retriever.pairs import Pair, distinct, plan_steps
from lora_hub_sdk.retriever.tasks import Task

TASKS = [Task(f"task-{letter}", tuple(f"{letter}{number}" for number in range(6))) for letter in "abcdefgh"]


def plan(tasks: list[Task] = TASKS, **options: object) -> list[list[Pair]]:
    options = {"steps": 12, "negatives": 3, "near": {}, "hard": 0.5, "seed": 0, **options}
    return plan_steps(tasks, **options)  # type: ignore[arg-type]


def test_every_pair_of_a_step_is_of_another_task_and_of_two_texts_of_it() -> None:
    texts = {task.name: set(task.inputs) for task in TASKS}
    for step in plan():
        assert len({pair.task for pair in step}) == len(step) == 4
        for pair in step:
            assert {pair.anchor, pair.positive} <= texts[pair.task]
            assert pair.anchor != pair.positive


def test_all_tasks_and_texts_have_their_turn_before_any_has_two_more() -> None:
    pairs = [pair for step in plan(steps=20, hard=0) for pair in step]
    turns = Counter(pair.task for pair in pairs)
    assert max(turns.values()) - min(turns.values()) <= 1
    seen = Counter(text for pair in pairs for text in (pair.anchor, pair.positive))
    assert max(seen.values()) - min(seen.values()) <= 2


def test_fewer_tasks_than_negatives_give_all_of_them() -> None:
    assert all(len(step) == 8 for step in plan(negatives=50))


def test_hard_negatives_come_from_the_nearest_tasks() -> None:
    near = {task.name: [other.name for other in TASKS if other is not task] for task in TASKS}
    near["task-a"] = ["task-f", "task-g", "task-h"]
    led_by_a = [step for step in plan(steps=200, near=near, hard=1.0, negatives=3) if step[0].task == "task-a"]
    assert led_by_a
    for step in led_by_a:
        assert {pair.task for pair in step[1:]} == {"task-f", "task-g", "task-h"}


def test_the_seed_decides() -> None:
    assert plan(seed=3) == plan(seed=3) != plan(seed=4)


def test_a_task_of_one_text_pairs_it_with_itself() -> None:
    only = plan([*TASKS[:2], Task("lonely", ("one",))], negatives=2)
    assert {(pair.anchor, pair.positive) for step in only for pair in step if pair.task == "lonely"} == {("one", "one")}


def test_texts_that_two_tasks_share_are_left_out_and_repeated_ones_kept_once() -> None:
    left = distinct([Task("a", ("Both  here", "own a", "Own A")), Task("b", ("both here", "own b", " "))])
    assert [task.inputs for task in left] == [("Own A",), ("own b",)]


@pytest.mark.parametrize(
    "tasks",
    [[], [Task("a", ("x", "y"))], [Task("a", ("same",)), Task("b", ("same",))], [Task("a", ("",)), Task("b", ("x",))]],
)
def test_fewer_than_two_tasks_with_texts_of_their_own_are_refused(tasks: list[Task]) -> None:
    with pytest.raises(SamplesError, match="two tasks or more"):
        distinct(tasks)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=9),
    negatives=st.integers(1, 12),
    hard=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_any_pool_can_be_planned(sizes: list[int], negatives: int, hard: float, seed: int) -> None:
    tasks = [Task(str(place), tuple(f"{place}/{n}" for n in range(size))) for place, size in enumerate(sizes)]
    near = {task.name: [other.name for other in reversed(tasks) if other is not task] for task in tasks}
    for step in plan(tasks, steps=5, negatives=negatives, hard=hard, seed=seed, near=near):
        assert len({pair.task for pair in step}) == len(step) == min(negatives + 1, len(tasks))
