"""AdapterSoup: whom it chooses for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.errors import NoAdaptersError
from lora_hub_sdk.evaluation.soup import AdapterSoup, mean_cosines
from lora_hub_sdk.evaluation.systems import system
from lora_hub_sdk.types import Routing, Sampling
from tests.evaluation.pool import Pool, make_pool, rows_of


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = make_pool(tmp_path_factory.mktemp("pool"), base)
    yield made
    made.hub.close()


def chosen(pool: Pool, tasks: list[str]) -> list[str]:
    """By numpy: the adapters in the order of their cosine with the mean of the tasks' training rows."""
    encode = pool.hub.encoder.encode
    mean = encode([row.inputs for row in rows_of(("river", "glass"), tasks).rows]).mean(0)
    vectors = {name: encode(samples).mean(0) for name, samples in pool.samples.items()}
    cosine = {name: mean @ vector / np.linalg.norm(vector) for name, vector in vectors.items()}
    return sorted(cosine, key=lambda name: -cosine[name])


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("tasks", [["french"], ["past", "plural", "colour"], ["mood", "rhyme"]])
def test_all_prompts_have_the_adapters_nearest_to_the_training_rows(
    pool: Pool, tmp_path: Path, tasks: list[str], k: int
) -> None:
    ground = pool.ground(tmp_path, training=rows_of(("river", "glass"), tasks))
    soup = system(f"adaptersoup@{k}")
    soup.prepare(ground)
    want = Routing("fusion", adapters=tuple(chosen(pool, tasks)[:k]))
    assert soup.routings(ground, pool.questions.rows) == [want] * len(pool.questions)


def test_a_pool_smaller_than_the_soup_is_taken_whole_and_weighed_alike(pool: Pool, tmp_path: Path) -> None:
    ground, soup = pool.ground(tmp_path), AdapterSoup(k=99)
    soup.prepare(ground)
    routing = soup.routings(ground, pool.questions.rows)[0]
    (answer,) = pool.hub.generate(["oak"], base_model=pool.base, routing=routing, sampling=Sampling(2))
    route = answer.trace.route
    assert route.averaged == "parameters"
    assert sorted(member.adapter.name for member in route.members) == sorted(pool.folders)
    assert {member.weight for member in route.members} == {1 / 6}


def test_soups_of_different_sizes_on_one_ground_stay_apart(pool: Pool, tmp_path: Path) -> None:
    ground = pool.ground(tmp_path)
    two, four = AdapterSoup("adaptersoup@2", 2), AdapterSoup("adaptersoup@4", 4)
    two.prepare(ground)
    four.prepare(ground)
    sizes = [len(one.routings(ground, pool.questions.rows)[0].adapters or ()) for one in (two, four)]  # type: ignore[union-attr]
    assert sizes == [2, 4]


def test_without_adapters_there_is_no_soup(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(NoAdaptersError, match="no adapters for"):
        mean_cosines(replace(pool.ground(tmp_path), namespace="nobody"), "adaptersoup")
