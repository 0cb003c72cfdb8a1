from __future__ import annotations

import numpy as np

from lora_hub_sdk.retriever.accuracy import accuracy

UNKNOWN = np.full(300, np.nan)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        ranks = np.where(rng.random(300) < 0.7, 1, 2)
        share = accuracy(ranks, UNKNOWN, (1,), 300, trial).top[1]
        assert share.low <= share.value <= share.high
        covered += share.low <= 0.7 <= share.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_no_resamples_give_none() -> None:
    ranks = np.random.default_rng(1).integers(1, 9, 300)
    assert accuracy(ranks, UNKNOWN, (1, 3), 100, 5) == accuracy(ranks, UNKNOWN, (1, 3), 100, 5)
    assert accuracy(ranks, UNKNOWN, (1, 3), 100, 5) != accuracy(ranks, UNKNOWN, (1, 3), 100, 6)
    bare = accuracy(ranks, UNKNOWN, (1, 3), 0, 5)
    assert bare.mrr.low == bare.mrr.value == bare.mrr.high
    assert bare.domain is None


def test_questions_without_a_domain_do_not_count_in_the_domains_share() -> None:
    found = accuracy(np.ones(4, dtype=np.int64), np.array([1.0, np.nan, 0.0, np.nan]), (1,), 50, 0)
    assert found.domain is not None
    assert found.domain.value == 0.5
    assert 0 <= found.domain.low <= 0.5 <= found.domain.high <= 1
