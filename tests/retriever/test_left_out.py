"""How well samples find their own adapters."""

from __future__ import annotations

import numpy as np
import pytest

from lora_hub_sdk.retriever.encoder import mean_vector, unit
from lora_hub_sdk.retriever.left_out import leave_one_out


def drawn(count: int, samples: int, spread: float, seed: int = 0) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    centres = dice.normal(size=(count, 16))
    return {
        str(place): np.stack([unit(centre + spread * dice.normal(size=16)) for _ in range(samples)])
        for place, centre in enumerate(centres)
    }


def test_it_is_what_searching_with_each_sample_by_hand_gives() -> None:
    vectors = drawn(7, 5, 1.5)
    ranks = []
    for name, own in vectors.items():
        for place, sample in enumerate(own):
            means = {other: mean_vector(held) for other, held in vectors.items()}
            means[name] = mean_vector(np.delete(own, place, axis=0))
            scores = {other: float(mean @ sample) for other, mean in means.items()}
            ranks.append(1 + sum(score > scores[name] for score in scores.values()))
    found = leave_one_out(vectors)
    assert found is not None
    assert found.searches == 35
    assert found.top_1 == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert found.top_3 == pytest.approx(np.mean([rank <= 3 for rank in ranks]))
    assert found.mrr == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert 0 < found.top_1 < 1


def test_only_those_asked_for_search_among_all() -> None:
    vectors = drawn(6, 4, 0.1)
    found = leave_one_out(vectors, ["0", "3"])
    assert found is not None
    assert (found.searches, found.top_1) == (8, 1.0)


def test_an_adapter_of_the_same_samples_counts_against_it() -> None:
    vectors = drawn(2, 4, 0.1)
    vectors["twin"] = vectors["0"]
    found = leave_one_out(vectors, ["0"])
    assert found is not None
    assert found.top_1 == 0


def test_a_lone_sample_cannot_search() -> None:
    vectors = drawn(3, 1, 0.1)
    assert leave_one_out(vectors) is None
    assert leave_one_out(vectors, []) is None


def test_of_very_many_samples_some_are_drawn() -> None:
    found = leave_one_out(drawn(60, 100, 0.5))
    assert found is not None
    assert found.searches == 5000
