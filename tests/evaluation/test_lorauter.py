"""LoRAuter: tasks ranked by measured scores that the registry keeps, and prompts mixed by their nearest tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from lora_hub_sdk.errors import ConfigurationError, NoAdaptersError
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.lorauter import Lorauter, lorauter_system
from lora_hub_sdk.evaluation.metrics import score
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.task_ranking import TaskRanking
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Routing, Sampling
from tests.evaluation.pool import Pool, add_twin, make_pool, rows_of

WORDS: Final = ("river", "glass", "bread", "cloud", "horse", "table", "green", "north", "seven", "music")
#: By task the adapter that answers it right, which is not the one that was made for it.
BEST: Final = {"french": "mood", "plural": "past", "rhyme": "rhyme", "colour": "mood"}


@pytest.fixture(scope="module")
def template(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pool, MixedSet]]:
    """A pool, and rows whose right answers are those of the adapters in ``BEST``; french by ROUGE, rhyme by F1."""
    pool = make_pool(tmp_path_factory.mktemp("pool"), base)
    rows = rows_of(WORDS, tuple(BEST)).rows
    routings = [Routing("selection", adapters=(BEST[row.task],)) for row in rows]
    lengths = [Sampling(16 if row.metric == "em" else 32) for row in rows]
    answers = pool.hub.generate([row.inputs for row in rows], base_model=base, routing=routings, sampling=lengths)
    told = [replace(row, targets=answer.text) for row, answer in zip(rows, answers, strict=True)]
    yield pool, MixedSet(tuple(told))
    pool.hub.close()


@pytest.fixture
def pool(template: tuple[Pool, MixedSet], tmp_path: Path, base: Path) -> Iterator[Pool]:
    """Of one test alone, with nothing measured yet."""
    made = make_pool(tmp_path / "pool", base)
    yield replace(made, training=template[1])
    made.hub.close()


def asked(hub: LoraHub) -> int:
    """Answers so far."""
    return sum(sum(stats.requests.values()) for stats in hub.stats())


def halving(pool: Pool, rows: list[MixedRow], names: list[str]) -> list[str]:
    """What is to come out, by the answers of all to all."""
    pairs = [(name, row) for name in names for row in rows]
    answers = pool.hub.generate(
        [row.inputs for _, row in pairs],
        base_model=pool.base,
        routing=[Routing("selection", adapters=(name,)) for name, _ in pairs],
        sampling=Sampling(16 if rows[0].metric == "em" else 32),
    )
    texts = {pair: answer.text for pair, answer in zip(pairs, answers, strict=True)}

    def key(name: str, count: int) -> tuple[float, float, str]:
        marks = [
            [score(metric, texts[name, row], row.targets) for metric in (row.metric, "f1")] for row in rows[:count]
        ]
        means = [round(sum(column) / count, 9) for column in zip(*marks, strict=True)]
        return -means[0], -means[1], name

    first = sorted(names, key=lambda name: key(name, 4))
    second = sorted(first[:3], key=lambda name: key(name, 8))
    third = sorted(second[:2], key=lambda name: key(name, 10))
    return [*third, *second[2:], *first[3:]]


def test_each_task_ranks_the_adapters_as_successive_halving_by_hand(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path)
    rows = {task: pool.training.of([task]).rows for task in BEST}
    found = TaskRanking(ground).of(rows)
    assert {task: ranking[0] for task, ranking in found.items()} == BEST
    # Of each task six adapters answer 4 rows, three 4 more, two the last 2.
    assert asked(pool.hub) == len(BEST) * (6 * 4 + 3 * 4 + 2 * 2)
    for task in ("french", "plural"):
        assert list(found[task]) == halving(pool, list(rows[task]), sorted(pool.folders))


def test_scores_stand_in_the_registry_and_are_not_measured_again(pool: Pool, tmp_path: Path) -> None:
    pool.hub.record_score("mood", "plural", "em", 99.0)
    ground = pool.ground(tmp_path / "one")
    system = lorauter_system("lorauter")
    assert system.learns
    system.prepare(ground)
    once = asked(pool.hub)
    assert once > 0
    routings = system.routings(ground, pool.questions.rows)
    for again in (pool.ground(tmp_path / "two"), ground):
        lorauter_system("lorauter-ood@2", 2, True).prepare(again)
        assert asked(pool.hub) == once
    assert system.routings(again, pool.questions.rows) == routings
    kept = pool.hub.scores("past")
    plural = {one.metric: one.value for one in kept if one.task == "plural" and one.metric.startswith("lorauter em")}
    assert sorted(plural.values()) == [100.0] * 3
    assert Counter(metric.split(",")[1] for metric in plural) == {" 4 rows": 1, " 8 rows": 1, " 10 rows": 1}
    assert [one.value for one in pool.hub.scores("mood") if one.metric == "em"] == [99.0]


def test_only_what_changed_is_measured_anew(pool: Pool, tmp_path: Path, base: Path) -> None:
    two = pool.training.of(["plural", "rhyme"])
    lorauter_system("lorauter").prepare(pool.ground(tmp_path, training=two))
    once = asked(pool.hub)
    tiny_adapter(pool.folders["german"], base, seed=77, rank=3)
    pool.hub.update("german")
    lorauter_system("lorauter").prepare(pool.ground(tmp_path, training=two))
    changed = asked(pool.hub) - once
    # The new content answers 4 rows of each task, and perhaps more where it is among the better half.
    assert 2 * 4 <= changed < once / 2
    other = MixedSet(tuple(replace(row, targets="x") if row.task == "plural" else row for row in two.rows))
    for ground in (
        pool.ground(tmp_path, training=other),
        pool.ground(tmp_path, training=two.of(["plural"]), template="alpaca"),
    ):
        before = asked(pool.hub)
        lorauter_system("lorauter").prepare(ground)
        assert asked(pool.hub) - before == 6 * 4 + 3 * 4 + 2 * 2, "one of the tasks, from the first round on"


def test_a_run_that_was_stopped_goes_on_where_it_was(
    pool: Pool, template: tuple[Pool, MixedSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {task: pool.training.of([task]).rows for task in ("plural", "colour")}
    record, times = LoraHub.record_score, iter(range(1000))

    def stopping(*args: Any, **options: Any) -> Any:
        if next(times) == 27:  # between the two scores of an adapter, in the second round
            raise KeyboardInterrupt
        return record(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoraHub, "record_score", stopping)
        with pytest.raises(KeyboardInterrupt):
            TaskRanking(pool.ground(tmp_path)).of(rows)
    found = TaskRanking(pool.ground(tmp_path)).of(rows)
    assert found == TaskRanking(template[0].ground(tmp_path)).of(rows), "as if nothing had happened"
    scored = Counter(
        (event.name, *event.detail.values()) for event in pool.hub.events(limit=1000) if event.action == "scored"
    )
    assert Counter(scored.values()) == {1: 2 * 2 * (6 + 3 + 2) - 1, 2: 1}, "only the torn one was measured again"


def by_hand(pool: Pool, rankings: dict[str, list[str]], row: MixedRow, k: int, *, ood: bool) -> dict[str, float]:
    encode = pool.hub.encoder.encode
    centres = {task: encode([one.inputs for one in pool.training.of([task]).rows]).mean(axis=0) for task in BEST}
    query = encode([row.inputs])[0]
    near = {
        task: float(query @ centre / np.linalg.norm(centre))
        for task, centre in centres.items()
        if not (ood and task == row.task)
    }
    nearest = sorted(near, key=lambda task: -near[task])[:k]
    raised = np.exp(np.array([near[task] for task in nearest]) / 0.2)
    weights: Counter[str] = Counter()
    for task, weight in zip(nearest, raised / raised.sum(), strict=True):
        weights[next(name for name in rankings[task] if not (ood and name == row.task))] += weight
    return dict(weights)


@pytest.mark.parametrize("ood", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_a_prompt_mixes_the_best_adapters_of_its_nearest_tasks(
    template: tuple[Pool, MixedSet], tmp_path: Path, k: int, ood: bool
) -> None:
    pool = replace(template[0], training=template[1])
    ground = pool.ground(tmp_path, namespace="default")
    system = Lorauter("any", k, ood)
    system.prepare(ground)
    rows = pool.questions.rows
    rankings = TaskRanking(ground).of({task: pool.training.sample(20).of([task]).rows for task in BEST})
    found = system.routings(ground, rows)
    assert found == Lorauter("any", k, ood).routings(ground, rows)
    for row, routing in zip(rows, found, strict=True):
        assert routing is not None
        assert (routing.strategy, routing.namespace) == ("mixture", "default")
        assert routing.adapters is not None
        assert routing.adapter_weights is not None
        given = dict(zip(routing.adapters, routing.adapter_weights, strict=True))
        want = by_hand(pool, {task: [*names] for task, names in rankings.items()}, row, k, ood=ood)
        assert given == {name: pytest.approx(weight, abs=1e-5) for name, weight in want.items()}
        assert len(given) > 1 or given == dict.fromkeys(given, 1.0)
        assert not (ood and row.task in given)
    routes = pool.hub.route([row.inputs for row in rows], base_model=pool.base, routing=[one for one in found if one])
    assert all(sum(member.weight for member in route.members) == pytest.approx(1) for route in routes)


def test_out_of_distribution_another_task_names_its_next_best_adapter(
    template: tuple[Pool, MixedSet], tmp_path: Path
) -> None:
    pool = replace(template[0], training=template[1])
    # "french" and "colour" are answered best by the adapter that belongs to the questions of "mood".
    ground = pool.ground(tmp_path)
    asked_of = [row for row in pool.questions.rows if row.task == "mood"]
    for ood, there in ((False, True), (True, False)):
        system = Lorauter("any", 9, ood)
        system.prepare(ground)
        routing = system.routings(ground, asked_of)[0]
        assert routing is not None
        assert ("mood" in (routing.adapters or ())) is there


def test_one_content_under_two_names_is_measured_once_and_masked_under_both(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path, training=pool.training.of(["plural", "colour"]))
    lorauter_system("lorauter").prepare(ground)
    once = asked(pool.hub)
    add_twin(pool, "twin", "mood", ["a", "b"])
    lorauter_system("lorauter").prepare(ground)
    assert asked(pool.hub) == once
    system = lorauter_system("lorauter-ood", ood=True)
    own = replace(ground, own={"mood": "twin"})
    routings = system.routings(own, [row for row in pool.questions.rows if row.task == "mood"])
    assert all(one is not None and not {"mood", "twin"} & {*(one.adapters or ())} for one in routings)


def test_without_rows_or_adapters_or_other_tasks_it_is_said_what_is_missing(pool: Pool, tmp_path: Path) -> None:
    ground: Ground = pool.ground(tmp_path, training=MixedSet(()))
    with pytest.raises(ConfigurationError, match="system 'lorauter' learns, and there are no training rows"):
        lorauter_system("lorauter").prepare(ground)
    alone = pool.ground(tmp_path, training=pool.training.of(["rhyme"]))
    system = lorauter_system("lorauter-ood", ood=True)
    system.prepare(alone)
    rhyme = [row for row in pool.questions.rows if row.task == "rhyme"]
    with pytest.raises(ConfigurationError, match="'rhyme' is answered without its own rows and adapter"):
        system.routings(alone, rhyme)
    with pytest.raises(NoAdaptersError, match="system 'lorauter': no adapters"):
        lorauter_system("lorauter").prepare(pool.ground(tmp_path, namespace="empty"))
