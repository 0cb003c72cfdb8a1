"""LoRAHub: what is searched, from what, and what becomes of a search that was interrupted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError, NoAdaptersError
from lora_hub_sdk.evaluation import lorahub
from lora_hub_sdk.evaluation.lorahub import LoraHubSearch, search_weights
from lora_hub_sdk.evaluation.systems import system
from lora_hub_sdk.types import Routing, Sampling
from tests.evaluation import reference
from tests.evaluation.pool import LEARNED, Pool, make_pool, rows_of

SHORT = LoraHubSearch(budget=9)
# A search of one trial is over before its optimizer has said all it has to say.
pytestmark = pytest.mark.filterwarnings("ignore:COBYLA")


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = make_pool(tmp_path_factory.mktemp("pool"), base)
    yield made
    made.hub.close()


def lines(folder: Path, name: str = "lorahub") -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def distance(weights: Sequence[float]) -> float:
    return float(((np.asarray(weights) - 0.7) ** 2).mean())


def test_a_search_begins_with_no_weights_and_stays_within_its_bounds() -> None:
    tried: list[Sequence[float]] = []

    def objective(weights: Sequence[float]) -> float:
        tried.append(weights)
        return float(-np.sum(weights))

    best = search_weights(objective, 4, budget=30, seed=3)
    assert tried[0] == (0.0,) * 4
    assert len(tried) == 30
    assert max(abs(one) for weights in tried for one in weights) <= 1.5
    assert sum(best) > 5.5  # of 6


def test_the_same_seed_finds_the_same_weights_whatever_else_is_drawn() -> None:
    np.random.seed(1)
    first = search_weights(distance, 20, budget=40, seed=5)
    np.random.seed(2)
    assert search_weights(distance, 20, budget=40, seed=5) == first
    assert distance(first) < distance([0.0] * 20)


def test_losses_that_are_no_numbers_are_the_worst() -> None:
    def objective(weights: Sequence[float]) -> float:
        return float("nan") if weights[0] > 0.2 else float("inf") if weights[1] > 0.2 else distance(weights)

    first, second = search_weights(objective, 2, budget=30, seed=0)
    assert first <= 0.2
    assert second <= 0.2


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_search_leaves_no_thread_that_a_process_would_wait_for(kind: type[BaseException]) -> None:
    before, calls = {*threading.enumerate()}, []

    def objective(weights: Sequence[float]) -> float:
        calls.append(weights)
        if len(calls) == 5:
            raise kind
        return distance(weights)

    with pytest.raises(kind) as raised:
        search_weights(objective, 6, budget=30, seed=0)
    left = {*threading.enumerate()} - before
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left), raised.value


def test_a_search_whose_best_is_the_last_trial_ends_its_thread_too() -> None:
    before = {*threading.enumerate()}
    search_weights(distance, 6, budget=3, seed=0)
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
        assert not thread.is_alive()


def test_without_nevergrad_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nevergrad", None)
    with pytest.raises(MissingExtraError, match=r"lora-hub-sdk\[evaluation\]"):
        search_weights(distance, 2, budget=3, seed=0)


def test_the_objective_is_the_answers_loss_of_the_fused_factors_and_a_penalty(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path, training=rows_of(LEARNED, ["past"]))
    LoraHubSearch(budget=4, count=3).prepare(ground)
    (found,) = lines(tmp_path)
    names, plain = list(found["adapters"]), reference.Plain(pool.base)  # type: ignore[call-overload]
    loras = [reference.Lora.read(pool.folders[name]) for name in names]

    def objective(weights: Sequence[float]) -> float:
        losses = []
        for row in ground.training.rows:
            asked, answer = (plain.tokenizer(text).input_ids for text in (row.inputs, row.targets))
            delta = reference.fusion(loras, weights)
            with torch.no_grad():
                losses.append(float(plain.loss(asked, [*answer, plain.tokenizer.eos_token_id], delta)))
        return float(np.mean(losses) + 0.05 * np.abs(weights).mean())

    assert len(names) == 3
    assert found["objective"] == pytest.approx(objective(found["weights"]), rel=1e-4)  # type: ignore[arg-type]
    assert found["base_objective"] == pytest.approx(objective([0.0] * 3), rel=1e-4)


def test_each_task_has_its_own_search_and_other_tasks_have_no_answer(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path, training=rows_of(LEARNED, ["past", "colour"]))
    SHORT.prepare(ground)
    found = {str(one["task"]): one for one in lines(tmp_path)}
    assert sorted(found) == ["colour", "past"]
    for row, routing in zip(pool.questions.rows, SHORT.routings(ground, pool.questions.rows), strict=True):
        if row.task not in found:
            assert routing is None
            continue
        assert routing is not None
        assert routing.strategy == "fusion"
        assert list(routing.adapters or ()) == found[row.task]["adapters"]
        assert list(routing.adapter_weights or ()) == found[row.task]["weights"]
    asked = [
        (row.inputs, one)
        for row, one in zip(pool.questions.rows, SHORT.routings(ground, pool.questions.rows), strict=True)
        if one
    ]
    answers = pool.hub.generate(
        [text for text, _ in asked], base_model=pool.base, routing=[one for _, one in asked], sampling=Sampling(2)
    )
    assert {answer.trace.route.averaged for answer in answers} == {"parameters"}


def test_one_search_for_all_tasks_answers_every_row(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path)
    mixed = LoraHubSearch("lorahub-mix", mixed=True, rows=3, budget=9)
    mixed.prepare(ground)
    assert len(lines(tmp_path, "lorahub-mix")) == 1
    found = mixed.routings(ground, pool.questions.rows)
    assert found[0] is not None
    assert found == [found[0]] * len(pool.questions)
    chosen = system("lorahub-mix")
    assert isinstance(chosen, LoraHubSearch)
    assert (chosen.mixed, chosen.rows, chosen.count, chosen.budget) == (True, 64, 20, 40)


def test_searches_are_kept_one_by_one_and_an_interrupted_one_starts_over(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pool.ground(tmp_path / "whole", training=rows_of(LEARNED, ["french", "mood", "past"]))
    SHORT.prepare(whole)
    ground = replace(whole, folder=tmp_path / "killed", shared={})
    searched: list[int] = []

    def counted(*given: object, **other: object) -> tuple[float, ...]:
        searched.append(1)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search_weights(*given, **other)  # type: ignore[arg-type]

    monkeypatch.setattr(lorahub, "search_weights", counted)
    with pytest.raises(KeyboardInterrupt):
        SHORT.prepare(ground)
    assert [one["task"] for one in lines(ground.folder)] == ["french"]
    SHORT.prepare(ground)
    SHORT.prepare(replace(ground, shared={}))
    assert len(searched) == 4
    rows = pool.questions.rows
    assert SHORT.routings(ground, rows) == SHORT.routings(whole, rows)


def test_another_seed_budget_or_row_is_another_search(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path, training=rows_of(LEARNED, ["past"]))
    SHORT.prepare(ground)
    SHORT.prepare(replace(ground, seed=1))
    SHORT.prepare(replace(ground, training=rows_of(LEARNED[:1], ["past"])))
    replace(SHORT, budget=3).prepare(ground)
    assert len({one["key"] for one in lines(tmp_path)}) == 4


def test_weights_of_zero_are_the_base_model_by_name_and_that_is_told(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ground = pool.ground(tmp_path, training=rows_of(LEARNED, ["past"]))
    only_start = LoraHubSearch(budget=1)
    only_start.prepare(ground)
    (found,) = lines(tmp_path)
    assert found["weights"] == [0.0] * 6
    assert found["objective"] == found["base_objective"]
    assert "past: no weights better than the base model's were found" in caplog.text
    rows = pool.questions.of(["past"]).rows
    assert only_start.routings(ground, rows) == [Routing("base")] * len(rows)


def test_a_pool_of_fewer_adapters_is_taken_whole_and_that_is_told(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LoraHubSearch(budget=1).prepare(pool.ground(tmp_path, training=rows_of(LEARNED, ["past"])))
    (found,) = lines(tmp_path)
    assert sorted(found["adapters"]) == sorted(pool.folders)  # type: ignore[call-overload]
    assert found["wanted"] == 20
    assert "6 adapters are all there are, not 20" in caplog.text


def test_adapters_are_drawn_anew_for_each_task(pool: Pool, tmp_path: Path) -> None:
    LoraHubSearch(budget=1, count=2).prepare(pool.ground(tmp_path))
    assert len({tuple(one["adapters"]) for one in lines(tmp_path)}) > 2  # type: ignore[arg-type]


def test_without_adapters_there_is_nothing_to_weigh(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(NoAdaptersError, match="none of the 0 adapters"):
        SHORT.prepare(replace(pool.ground(tmp_path), namespace="nobody"))


def test_a_file_of_something_else_is_refused(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "lorahub.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigurationError, match="holds no searches"):
        SHORT.prepare(pool.ground(tmp_path))
