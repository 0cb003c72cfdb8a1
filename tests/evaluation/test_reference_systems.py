"""The catalogue's systems against their definitions: which adapters, by which weights, learned from what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.composition.ramole import Ramole
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.experts import FixedExperts, cluster_experts
from lora_hub_sdk.evaluation.gated import RetrievedGate
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.lorahub import LoraHubSearch
from lora_hub_sdk.evaluation.metrics import score
from lora_hub_sdk.evaluation.mixed_set import MixedRow
from lora_hub_sdk.evaluation.systems import SYSTEMS, system
from lora_hub_sdk.types import Route
from tests.evaluation import reference
from tests.evaluation.bench import Bench, by_experts
from tests.evaluation.bench import bench as bench
from tests.evaluation.pool import TASKS, add_twin, make_pool
from tests.evaluation.reference import Delta


@pytest.fixture(scope="module")
def ground(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return bench.pool.ground(tmp_path_factory.mktemp("learned"))


def routes_of(ground: Ground, name: str, rows: Sequence[MixedRow]) -> list[Route | None]:
    """What a system, prepared, does with each row."""
    chosen = system(name)
    chosen.prepare(ground)
    found = chosen.routings(ground, rows)
    assert found == system(name).routings(ground, rows)
    asked = [(row.inputs, routing) for row, routing in zip(rows, found, strict=True) if routing is not None]
    routes = iter(
        ground.hub.route([text for text, _ in asked], base_model=ground.base_model, routing=[one for _, one in asked])
    )
    return [None if routing is None else next(routes) for routing in found]


def told(route: Route | None) -> dict[str, Any] | None:
    """Names and weights."""
    return None if route is None else {one.adapter.name: pytest.approx(one.weight, abs=1e-5) for one in route.members}


def centres(bench: Bench) -> dict[str, reference.Vectors]:
    encode = bench.pool.hub.encoder.encode
    return {name: reference.centre(encode(samples)) for name, samples in bench.pool.samples.items()}


def by_cosine(bench: Bench, row: MixedRow, k: int, *, own: bool = True) -> list[tuple[str, float]]:
    query = bench.pool.hub.encoder.encode([row.inputs])[0]
    return reference.nearest(query, centres(bench), k, but=() if own else (row.task,))


@pytest.mark.parametrize("own", [True, False], ids=["", "ood"])
@pytest.mark.parametrize(
    ("name", "k"), [("selection", 1), ("mixture", 3), ("mixture@2", 2), ("fusion", 3), ("similarity", 3)]
)
def test_retrieval_takes_the_nearest_adapters_and_out_of_distribution_never_the_own(
    bench: Bench, ground: Ground, name: str, k: int, own: bool
) -> None:
    rows = bench.pool.questions.rows
    name = name if own else "-ood@".join([*name.split("@"), ""][:2]).removesuffix("@")
    for row, route in zip(rows, routes_of(ground, name, rows), strict=True):
        near = by_cosine(bench, row, k, own=own)
        weights = [1 / k] * k
        if name.startswith("similarity"):
            weights = reference.softmax([cosine for _, cosine in near], 0.2)
        assert told(route) == dict(zip([other for other, _ in near], weights, strict=True))
        assert route is not None
        assert route.averaged == ("parameters" if name.startswith("fusion") else "outputs")
        assert own or row.task not in [one.adapter.name for one in route.members]


def test_base_and_perfect_selection_search_nothing(bench: Bench, ground: Ground) -> None:
    rows = bench.pool.questions.rows
    assert [told(route) for route in routes_of(ground, "base", rows)] == [{}] * len(rows)
    want = [{row.task: 1.0} if row.task in bench.loras else None for row in rows]
    assert [told(route) for route in routes_of(ground, "perfect", rows)] == want


def test_adaptersoup_is_one_fusion_of_those_nearest_to_all_training_rows(bench: Bench, ground: Ground) -> None:
    rows = bench.pool.questions.rows
    mean = reference.centre(bench.pool.hub.encoder.encode([row.inputs for row in ground.training.rows]))
    want = {name: 1 / 3 for name, _ in reference.nearest(mean, centres(bench), 3)}
    routes = routes_of(ground, "adaptersoup", rows)
    assert [told(route) for route in routes] == [want] * len(rows)
    assert all(route is not None and route.averaged == "parameters" for route in routes)


def loss(bench: Bench, row: MixedRow, delta: Delta) -> float:
    tokenizer = bench.plain.tokenizer
    answer = [*tokenizer(row.targets).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        return float(bench.plain.loss(tokenizer(row.inputs).input_ids, answer, delta))


def test_experts_are_the_adapters_that_answer_their_domain_best(bench: Bench, ground: Ground) -> None:
    rows = ground.training.rows
    want = {}
    for domain in sorted({row.domain for row in rows}):
        own = [task for task in bench.loras if TASKS[task][0] == domain]
        asked = [row for row in rows if row.domain == domain]
        means = {
            name: sum(loss(bench, row, reference.mixture(bench.several(name), [1.0])) for row in asked) for name in own
        }
        want[domain] = min(means, key=lambda name: means[name])
    assert dict(cluster_experts(ground)) == want


def test_lorahub_is_a_fusion_by_the_objective_of_its_paper(bench: Bench, ground: Ground) -> None:
    tasks = ("french", "colour")
    few, ground = LoraHubSearch(count=4, budget=6), replace(ground, training=ground.training.of(tasks))
    few.prepare(ground)
    rows = bench.pool.questions.of(tasks).rows
    searches = {one["task"]: one for one in map(json.loads, (ground.folder / "lorahub.jsonl").read_text().splitlines())}
    assert searches.keys() == set(tasks)
    for row, routing in zip(rows, few.routings(ground, rows), strict=True):
        search = searches[row.task]
        lessons = [one for one in ground.training.rows if one.task == row.task]

        def objective(weights: Sequence[float], names: Sequence[str], rows: Sequence[MixedRow] = lessons) -> float:
            delta = reference.fusion(bench.several(*names), weights)
            mean = sum(loss(bench, one, delta) for one in rows) / len(rows)
            return mean + 0.05 * sum(map(abs, weights)) / len(weights)

        weights, names = search["weights"], search["adapters"]
        assert len(set(names)) == 4
        assert all(-1.5 <= weight <= 1.5 for weight in weights)
        assert search["objective"] == pytest.approx(objective(weights, names), rel=1e-5)
        assert search["base_objective"] == pytest.approx(objective([0.0] * 4, names), rel=1e-5)
        assert search["objective"] <= search["base_objective"]
        assert routing is not None
        if any(weights):
            bench.check([row.inputs], [routing], [reference.fusion(bench.several(*names), weights)])


@pytest.mark.parametrize("strategy", ["moe-soft", "moe-top3", "moe-top1", "smear", "arrow"])
def test_trained_experts_are_served_as_their_file_tells(bench: Bench, ground: Ground, strategy: str) -> None:
    chosen = FixedExperts(strategy, {} if strategy == "arrow" else {"steps": 3, "learning_rate": 0.3, "batch": 6})
    chosen.prepare(ground)
    gate = ExpertGate.load(ground.folder / f"{strategy}.safetensors")
    best = cluster_experts(ground).values() if strategy != "arrow" else bench.loras
    assert sorted(gate.experts) == sorted(best)
    rows = bench.pool.questions.rows[::2]
    routings = chosen.routings(ground, rows)
    deltas = [by_experts(bench, gate)] * len(rows)
    bench.check([row.inputs for row in rows], [one for one in routings if one is not None], deltas)


@pytest.mark.parametrize("ood", [False, True])
def test_ramole_is_trained_on_own_adapters_and_served_as_its_file_tells(
    bench: Bench, ground: Ground, ood: bool
) -> None:
    chosen = RetrievedGate(k=3, ood=ood, recipe={"steps": 3, "learning_rate": 0.3, "batch": 4, "width": 4})
    chosen.prepare(ground)
    gate = Ramole.load(ground.folder / "ramole.safetensors")
    routers = {path: (one.a, one.b) for path, one in gate.routers.items()}
    rows = bench.pool.questions.rows[: len(TASKS)]
    near = [[name for name, _ in by_cosine(bench, row, 3, own=not ood)] for row in rows]
    routings = chosen.routings(ground, rows)
    bench.check(
        [row.inputs for row in rows],
        [one for one in routings if one is not None],
        [reference.ramole(bench.several(*names), routers) for names in near],
    )


def test_lorauter_mixes_the_measured_best_of_the_nearest_tasks(bench: Bench, ground: Ground) -> None:
    known = ("plural", "past", "mood", "colour")
    ground = replace(ground, training=ground.training.of(known), shared={})
    rows, encode = bench.pool.questions.rows[: len(TASKS)], bench.pool.hub.encoder.encode
    tasks = {task: reference.centre(encode([one.inputs for one in ground.training.of([task]).rows])) for task in known}

    def rank(task: str) -> list[str]:
        """The best first: by exact match, then by token F1, then by name."""
        lessons = ground.training.of([task]).rows

        def mark(name: str) -> tuple[float, float, str]:
            delta = reference.mixture(bench.several(name), [1.0])
            texts = [bench.plain.answer(row.inputs, delta, 16)[0] for row in lessons]
            em, f1 = (
                sum(score(metric, text, row.targets) for text, row in zip(texts, lessons, strict=True))
                for metric in ("em", "f1")
            )
            return -em, -f1, name

        return sorted(bench.loras, key=mark)

    ranked = {task: rank(task) for task in known}
    for name, ood in (("lorauter", False), ("lorauter-ood", True)):
        for row, route in zip(rows, routes_of(ground, name, rows), strict=True):
            masked = (row.task,) if ood else ()
            near = reference.nearest(encode([row.inputs])[0], tasks, 3, but=masked)
            want: dict[str, float] = {}
            for (task, _), weight in zip(near, reference.softmax([cosine for _, cosine in near], 0.2), strict=True):
                best = next(name for name in ranked[task] if name not in masked)
                want[best] = want.get(best, 0.0) + weight
            assert told(route) == want


def test_an_own_adapter_is_masked_under_all_names_of_its_content(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", base)
    with pool.hub:
        add_twin(pool, "twin", "french", ["Translate oak to French"])
        ground = pool.ground(tmp_path / "learned", training=pool.training.of(["french", "past"]))
        rows = [row for row in pool.questions.rows if row.task == "french"]
        for name in SYSTEMS:
            if name.endswith("-ood") and name not in ("ramole-ood", "gate-ood"):
                for route in routes_of(ground, name, rows):
                    assert route is not None
                    assert {"french", "twin"}.isdisjoint(one.adapter.name for one in route.members)
        # An expert is there once.
        FixedExperts("arrow").prepare(ground)
        assert len(ExpertGate.load(ground.folder / "arrow.safetensors").experts) == len(pool.folders)


def test_a_task_whose_own_adapter_is_all_of_the_pool_is_refused_out_of_distribution(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", base)
    with pool.hub:
        for name in [name for name in pool.folders if name != "mood"]:
            pool.hub.remove(name)
        ground = pool.ground(tmp_path / "learned", own={"mood": "mood"})
        rows = [row for row in pool.questions.rows if row.task == "mood"]
        assert [told(route) for route in routes_of(ground, "mixture", rows)] == [{"mood": 1.0}] * len(rows)
        with pytest.raises(ConfigurationError, match="own adapter"):
            system("mixture-ood").routings(ground, rows)
