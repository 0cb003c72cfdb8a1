"""The catalogue, and the systems that are a search or a pinned adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedSet
from lora_hub_sdk.evaluation.systems import DESCRIPTIONS, SYSTEMS, system
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Routing, Sampling
from tests.encoders import Hashing
from tests.evaluation.pool import Pool, add_twin, make_pool


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = make_pool(tmp_path_factory.mktemp("pool"), base)
    yield made
    made.hub.close()


@pytest.fixture
def ground(pool: Pool, tmp_path: Path) -> Ground:
    return pool.ground(tmp_path / "learned")


def routings(name: str, ground: Ground, questions: MixedSet) -> list[Routing | None]:
    chosen = system(name)
    chosen.prepare(ground)
    return chosen.routings(ground, questions.rows)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_system_has_its_name_and_a_line_that_tells_what_it_is(name: str) -> None:
    assert system(name).name == name
    assert "\n" not in DESCRIPTIONS[name]


def test_the_table_comes_first_among_all_that_is_described() -> None:
    assert tuple(DESCRIPTIONS)[: len(SYSTEMS)] == SYSTEMS
    assert set(DESCRIPTIONS) - set(SYSTEMS) == {
        "fitted", "fitted-ood", "sparse", "sparse-ood", "lorahub-mix"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["best", "", "mixture@0", "mixture@", "mixture@03", "mixture@3-ood", "base-ood", "perfect-ood", "Mixture", 3],
)
def test_an_unknown_name_is_told_all_names(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"choose among base, perfect, .*lorahub-mix"):
        system(name)


@pytest.mark.parametrize("name", ["base@2", "selection@3", "selection-ood@3", "smear@4", "lorahub@3"])
def test_a_number_of_adapters_is_refused_where_it_means_nothing(name: str) -> None:
    with pytest.raises(ConfigurationError, match="takes no number of adapters; those that do are fusion, mixture"):
        system(name)


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("base", Routing("base")),
        ("selection", Routing("selection")),
        ("fusion", Routing("fusion")),
        ("mixture@7", Routing("mixture", k=7)),
        ("similarity", Routing("mixture", weights="similarity")),
        ("gate@2", Routing("mixture", k=2, weights="gate")),
    ],
)
def test_a_system_is_one_routing_for_all_rows(pool: Pool, ground: Ground, name: str, routing: Routing) -> None:
    assert routings(name, ground, pool.questions) == [routing] * len(pool.questions)


def test_out_of_distribution_each_row_is_searched_without_its_own_adapter(pool: Pool, ground: Ground) -> None:
    found = routings("mixture-ood@2", ground, pool.questions)
    for row, routing in zip(pool.questions.rows, found, strict=True):
        # Nobody made an adapter for colours.
        assert routing == Routing("mixture", k=2, exclude=() if row.task == "colour" else (row.task,))


def test_perfect_selection_has_no_answer_to_a_task_without_an_adapter(pool: Pool, ground: Ground) -> None:
    for row, routing in zip(pool.questions.rows, routings("perfect", ground, pool.questions), strict=True):
        assert routing == (None if row.task == "colour" else Routing("selection", adapters=(row.task,)))


@pytest.mark.parametrize("name", ["perfect", "mixture-ood", "ramole", "moe-soft"])
def test_an_own_adapter_that_nobody_registered_is_refused_where_its_task_matters(
    pool: Pool, ground: Ground, name: str
) -> None:
    wrong = replace(ground, own={**ground.own, "past": "passed"})
    with pytest.raises(ConfigurationError, match="task 'past' names adapter 'passed', and none of that name is in"):
        routings(name, wrong, pool.questions)


def test_an_own_adapter_of_a_task_that_nobody_asks_does_not_matter(pool: Pool, ground: Ground) -> None:
    other = replace(ground, own={**ground.own, "sums": "sums"})
    assert None not in routings("mixture-ood", other, pool.questions)


def test_answers_come_for_all_rows_also_with_more_adapters_asked_than_there_are(pool: Pool, ground: Ground) -> None:
    prompts = [row.inputs for row in pool.questions.rows]
    found = [one for name in ("mixture@99", "fusion-ood@99") for one in routings(name, ground, pool.questions)]
    answers = pool.hub.generate(
        prompts * 2, base_model=pool.base, routing=[one for one in found if one], sampling=Sampling(2)
    )
    sizes = [len(answer.trace.route.members) for answer in answers]
    assert sizes == [6] * len(prompts) + [6 if row.task == "colour" else 5 for row in pool.questions.rows]


OneHub = Callable[[str], LoraHub]


@pytest.fixture
def one_hub(tmp_path: Path, base: Path) -> Iterator[OneHub]:
    """Makes hubs with a single adapter of a name."""
    made: list[LoraHub] = []

    def open_one(name: str) -> LoraHub:
        hub = LoraHub(tmp_path / f"{len(made)}.db", index="exact", encoder=Hashing("e"))
        made.append(hub)
        hub.register(tiny_adapter(tmp_path / name, base), base_model=base, name=name, samples=["one", "two"])
        return hub

    yield open_one
    for hub in made:
        hub.close()


def test_out_of_distribution_a_pool_of_the_own_adapter_alone_is_refused(
    one_hub: OneHub, pool: Pool, base: Path, tmp_path: Path
) -> None:
    ground = Ground(hub=one_hub("french"), base_model=base, own={"french": "french"}, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="task 'french' is answered without its own adapter 'french', and the"):
        routings("selection-ood", ground, pool.questions)
    unasked = pool.questions.of(["past"])
    assert routings("selection-ood", ground, unasked) == [Routing("selection")] * len(unasked)


def test_an_own_adapter_is_left_out_under_all_its_names(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", base)
    add_twin(pool, "twin", "french", ["Translate tree to French"])
    try:
        rows = pool.questions.of(["french"])
        found = routings("selection-ood", pool.ground(tmp_path), rows)
        assert found == [Routing("selection", exclude=("french", "twin"))] * len(rows)
    finally:
        pool.hub.close()


def test_weights_are_learned_once_and_never_in_place_of_those_that_are_kept(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", base)
    try:
        ground = pool.ground(tmp_path)
        assert pool.hub.weight_rule() is None
        system("sparse-ood").prepare(ground)
        learned = pool.hub.weight_rule()
        assert learned == pool.hub.fit_weights().rule
        wide = pool.hub.fit_weights(k=5).rule
        assert wide != learned
        system("gate").prepare(ground)
        assert pool.hub.weight_rule() == wide
    finally:
        pool.hub.close()


def test_weights_cannot_be_learned_from_one_adapter(one_hub: OneHub, base: Path, tmp_path: Path) -> None:
    ground = Ground(hub=one_hub("french"), base_model=base, own={}, folder=tmp_path)
    with pytest.raises(SamplesError, match="register two or more"):
        system("gate").prepare(ground)


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_that_learn_say_so_and_refuse_a_ground_without_rows(ground: Ground, name: str) -> None:
    empty, chosen = replace(ground, training=MixedSet(())), system(name)
    if chosen.learns:
        with pytest.raises(ConfigurationError, match=f"system '{name}' learns, and there are no training rows"):
            chosen.prepare(empty)
    elif name != "arrow":  # which loads the base model
        chosen.prepare(empty)
        assert not list(ground.folder.iterdir())
