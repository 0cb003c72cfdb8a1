from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.fitting import hit_wordings
from lora_hub_sdk.retriever.held_out import HeldOut, encoded, hold_out
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.sample_pool import SamplePool
from lora_hub_sdk.retriever.tasks import Task, task_vectors
from lora_hub_sdk.testing import tiny_adapter
from tests.encoders import Hashing

ENCODER = Hashing("held out")
TASKS = [
    Task("dates", tuple(f"Write {day} May 1968 in ISO form" for day in range(2, 8))),
    Task("moods", tuple(f"Is this review good or bad? The food was {how}" for how in "abcdef")),
    Task("sums", tuple(f"What is {number} + 12?" for number in range(3, 9))),
]


def pool(tasks: list[Task] | None = None) -> SamplePool:
    return SamplePool(tasks or TASKS, task_vectors(ENCODER, tasks or TASKS))


@pytest.mark.parametrize("rerank", [False, True])
def test_a_sample_finds_what_a_registry_without_it_would_find(
    rerank: bool, open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    held, warnings = hold_out(pool(), 3, rerank=rerank)
    assert (len(held), warnings) == (18, [])
    for left_out in (0, 4):
        hub = open_hub(database=":memory:", index="exact", encoder=ENCODER, rerank=rerank)
        for seed, task in enumerate(TASKS):
            samples = [text for row, text in enumerate(task.inputs) if (task.name, row) != ("moods", left_out)]
            hub.register(tiny_adapter(tmp_path / f"{left_out} {task.name}", base, seed=seed), samples=samples)
        prompt = TASKS[1].inputs[left_out]
        hits = hub.search(prompt, 3)
        row = 6 + left_out
        assert held.cosines[row] == pytest.approx([hit.score for hit in hits], abs=1e-5)
        (words,) = hit_wordings([prompt], [hits], hub._retriever.reranker.profiles)
        assert held.words[row] == pytest.approx(words, abs=1e-5)
        assert list(held.right[row]) == [hit.adapter.name.endswith("moods") for hit in hits]
        assert held.adapters[row] == 1


def test_adapters_of_one_content_and_those_that_share_a_sample_are_right_together() -> None:
    shared = [TASKS[0], Task("more", (*TASKS[1].inputs, TASKS[0].inputs[0])), Task("twin", TASKS[2].inputs)]
    held, _ = hold_out(pool(shared), 3, contents={"dates": "x", "more": "y", "twin": "x"})
    assert len(held) == 18
    counts = held.right.sum(axis=1)
    assert list(counts) == [3] + [2] * 5 + [1] * 6 + [2] * 6


def test_what_no_adapter_can_be_found_for_is_dropped() -> None:
    held, _ = hold_out(pool([*TASKS[:2], Task("once", ("Ask the oracle",))]), 5)
    assert len(held) == 12
    assert np.isneginf(held.cosines[:, 3:]).all()
    assert np.isnan(held.words[:, 3:]).all()
    assert not held.right[:, 3:].any()


def test_questions_search_beside_the_samples_and_may_have_several_adapters() -> None:
    asked = [
        Question("Good or bad: the soup was cold", "moods"),
        Question(TASKS[0].inputs[1], "dates"),
        Question("Good or bad: the soup was cold", "sums"),
    ]
    held, _ = hold_out(pool(), 3, questions=encoded(ENCODER, asked))
    assert len(held) == 19
    assert list(held.right.sum(axis=1)) == [2] + [1] * 18
    alone, _ = hold_out(pool(), 3)
    # A question that is a sample is left out of its adapter like one, and is not asked twice.
    assert held.cosines[1] == pytest.approx(alone.cosines[1])
    with pytest.raises(ConfigurationError, match="'poems'"):
        hold_out(pool(), 3, questions=encoded(ENCODER, [Question("Rhyme", "poems")]))


def test_parts_that_are_joined_share_no_adapter() -> None:
    first, _ = hold_out(pool(TASKS[:2]), 2)
    second, _ = hold_out(pool(TASKS[1:]), 2)
    empty, _ = hold_out(pool([Task("once", ("Ask the oracle",))]), 2)
    whole = HeldOut.joined([first, empty, second])
    assert len(whole) == 24
    assert len(set(whole.adapters)) == 4
    assert whole.cosines[12:] == pytest.approx(second.cosines)
