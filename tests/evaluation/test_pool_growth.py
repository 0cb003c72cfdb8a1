"""Sub-pools hold what they should, and each question is answered from its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.answers import read_answers
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.pool_growth import SubPools, grow_pool
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from tests.encoders import Hashing

NAMES = tuple(f"t{n}" for n in range(5))
OWN = {name: name for name in NAMES[:3]}
#: Each is one of its adapter's samples, so that its own adapter is the nearest.
QUESTIONS = MixedSet(tuple(MixedRow(f"of {name}", "x", name, "d", "em") for name in (*NAMES[:3], "t4", "unknown")))


@pytest.fixture
def ground(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> Ground:
    hub = open_hub(encoder=Hashing("h"), index="exact")
    for seed, name in enumerate(NAMES):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed), samples=[f"of {name}", f"{name}."], name=name)
    return Ground(hub=hub, base_model=base, own=OWN, folder=tmp_path / "learned")


def test_a_pool_has_its_own_adapter_or_not_and_larger_ones_hold_the_smaller() -> None:
    pools = SubPools(NAMES, OWN, seed=3)
    for ood in (False, True):
        drawn = [pools.of("t1", size, ood=ood) for size in range(1, 6)]
        assert [len(one) for one in drawn] == ([1, 2, 3, 4, 4] if ood else [1, 2, 3, 4, 5])
        assert all(("t1" in one) != ood for one in drawn)
        assert all(set(small) <= set(large) for small, large in pairwise(drawn))
        assert {*pools.without("t1", 2, ood=ood), *drawn[1]} == {*NAMES}
    assert len({pools.of("t1", 3, ood=True), SubPools(NAMES, OWN, seed=4).of("t1", 3, ood=True)}) == 2
    assert pools.of("t1", 3) == SubPools(NAMES[::-1], OWN, seed=3).of("t1", 3)


def test_every_question_is_answered_from_its_own_sub_pool(ground: Ground, tmp_path: Path) -> None:
    found = grow_pool(ground, QUESTIONS, output=tmp_path / "run", sizes=(2, 99), k=2)
    assert found.questions == 3
    assert {name: list(points) for name, points in found.quality.items()} == {
        name + end: sizes
        for name in ("selection", "mixture", "fusion", "gate")
        for end, sizes in (("", [2, 5]), ("-ood", [2, 4]))
    }
    pools = SubPools(NAMES, OWN, ground.seed)
    routes = {(one.system, one.task): one.route for one in read_answers(tmp_path / "run")}
    for (system, task), route in routes.items():
        assert route is not None
        members = {one["name"] for one in route["adapters"]}
        if system == "perfect":
            assert members == {task}
            continue
        size = system.partition("#")[2].removesuffix("-ood")
        assert members <= set(pools.of(task, int(size), ood=system.endswith("-ood")))
        assert members
    assert found.own_first == {2: 1, 5: 1}
    assert [curve.name for curve in found.curves] == list(found.quality)
    # A second call finds all answers there.
    again = grow_pool(ground, QUESTIONS, output=tmp_path / "run", sizes=(2, 99), k=2)
    assert again.as_dict() == found.as_dict()


@pytest.mark.parametrize("options", [{"sizes": ()}, {"sizes": (0,)}, {"strategies": ("moe",)}, {"strategies": ()}])
def test_what_cannot_be_studied_is_refused(ground: Ground, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="expected one or more"):
        grow_pool(ground, QUESTIONS, output=tmp_path / "run", **options)  # type: ignore[arg-type]
