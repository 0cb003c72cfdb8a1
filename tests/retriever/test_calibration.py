"""From which score on an adapter fits: the bound, its promise, and pools that are hardly pools."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.calibration import Calibration, calibrate, calibrate_encoder
from lora_hub_sdk.retriever.encoder import SentenceEncoder, mean_vector
from lora_hub_sdk.retriever.fitting import FitRule, wording
from lora_hub_sdk.retriever.lexicon import grams, profile
from lora_hub_sdk.retriever.settings import RetrieverSettings
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Routing

Vectors = NDArray[np.float32]


def test_two_adapters_that_nothing_joins_are_told_apart_without_a_mistake() -> None:
    tasks = [Task("sum", ("add 1 to 2", "add 3 to 4", "add 5 to 6")), Task("fr", ("dis un", "dis deux", "dis trois"))]
    found = calibrate(tasks, {"sum": axis(0, 3), "fr": axis(1, 3)}, false_abstain=0.25)
    # floor(0.25 * 7) = 1: the smallest of six scores, each the cosine 1 with what is left of its own adapter.
    assert found.min_score == 1.0
    assert (found.samples, found.adapters) == (6, 2)
    for rates in (found.by_cosine, found.by_rule):
        assert (rates.false_abstain, rates.false_route, rates.false_route_domain) == (0.0, 0.0, None)


def test_the_bound_is_the_sample_that_the_share_says_each_left_out_of_its_adapter() -> None:
    dice = np.random.default_rng(3)
    vectors = {name: near(dice, 4, spread) for name, spread in (("a", 0.5), ("b", 1.0), ("c", 2.0))}
    tasks = [Task(name, tuple(f"{name} {row} x" for row in range(4))) for name in vectors]
    scores = []
    for name, own in vectors.items():
        for row, sample in enumerate(own):
            means = [
                mean_vector(np.delete(rows, row, axis=0) if other == name else rows) for other, rows in vectors.items()
            ]
            scores.append(max(float(mean @ sample) for mean in means))
    for share, wanted in ((0.1, 1), (0.2, 2), (0.5, 6)):
        found = calibrate(tasks, vectors, false_abstain=share)
        assert found.min_score == pytest.approx(sorted(scores)[wanted - 1], abs=2e-6)
        assert found.by_cosine.false_abstain == pytest.approx((wanted - 1) / 12)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_over_many_draws_no_more_prompts_are_given_away_than_was_allowed(share: float) -> None:
    by_cosine, by_rule = [], []
    for seed in range(20):
        world = World(np.random.default_rng(seed), tasks=6)
        pool = [world.draw(task, 8) for task in range(6)]
        tasks = [Task(str(place), tuple(texts)) for place, (texts, _) in enumerate(pool)]
        vectors = {task.name: rows for task, (_, rows) in zip(tasks, pool, strict=True)}
        found = calibrate(tasks, vectors, false_abstain=share)
        means = np.stack([mean_vector(rows) for rows in vectors.values()])
        profiles = [profile(task.inputs) for task in tasks]
        for task in range(6):
            for text, prompt in zip(*world.draw(task, 10), strict=True):
                cosines = means @ prompt
                by_cosine.append(cosines.max() < found.min_score)
                by_rule.append(not found.rule.fits(list(cosines), grams(text), profiles).any())
    # 1,200 prompts over 20 draws. A bound of no use would give nearly none away.
    assert 0.4 * share < np.mean(by_cosine) < share + 0.03
    assert 0.4 * share < np.mean(by_rule) < share + 0.03


def test_words_tell_what_the_cosine_does_not() -> None:
    world = World(np.random.default_rng(0), tasks=8, spread=8.0)  # vectors that say next to nothing
    tasks, vectors = world.pool(10)
    found = calibrate(tasks, vectors, false_abstain=0.1)
    assert (found.by_cosine.false_route or 0.0) > 0.6
    assert 0.0 <= (found.by_rule.false_route or 0.0) < 0.2


def test_a_domain_taken_away_leaves_fewer_strangers_than_an_adapter() -> None:
    world = World(np.random.default_rng(1), tasks=4)
    texts, rows = world.draw(0, 20)
    tasks = [
        Task("one", tuple(texts[:10]), "twins"),
        Task("other", tuple(texts[10:]), "twins"),
        *(Task(str(place), tuple(world.draw(place, 10)[0]), f"domain {place}") for place in (1, 2, 3)),
    ]
    vectors = {"one": rows[:10], "other": rows[10:], **{str(place): world.draw(place, 10)[1] for place in (1, 2, 3)}}
    found = calibrate(tasks, vectors, false_abstain=0.1).by_rule
    assert (found.false_route or 0.0) >= 0.3  # the twins' 20 of 50 samples still find each other
    assert found.false_route_domain is not None
    assert found.false_route_domain < 0.1


def test_too_few_samples_bound_nothing_and_say_so() -> None:
    found = calibrate([Task("a", ("x y", "x z"))], {"a": axis(0, 2)}, false_abstain=0.05)
    assert found.min_score == -1.0
    assert found.rule.fits([-1.0], grams("nothing alike"), [profile(["x"])]).all()
    assert any("at least 19" in warning for warning in found.warnings)


def test_one_adapter_alone_has_nobody_to_be_mistaken_for() -> None:
    tasks, vectors = World(np.random.default_rng(2), tasks=1).pool(30)
    found = calibrate(tasks, vectors, false_abstain=0.1)
    assert found.samples == 30
    assert found.by_rule.false_route is None
    assert found.min_score > -1.0


def test_adapters_of_one_sample_are_searched_and_do_not_search() -> None:
    tasks, vectors = World(np.random.default_rng(2), tasks=3).pool(1)
    found = calibrate(tasks, vectors)
    assert (found.samples, found.adapters, found.min_score) == (0, 3, -1.0)
    assert found.by_rule.false_abstain == 0.0
    assert found.warnings


def test_a_sample_that_several_adapters_have_counts_once_and_is_left_out_of_all() -> None:
    tasks, vectors = World(np.random.default_rng(4), tasks=3).pool(10)
    twins = [*tasks, *(Task(f"{task.name}'", tuple(text.upper() for text in task.inputs)) for task in tasks)]
    both = vectors | {f"{name}'": rows for name, rows in vectors.items()}
    once, twice = calibrate(tasks, vectors, false_abstain=0.1), calibrate(twins, both, false_abstain=0.1)
    assert (once.samples, twice.samples, twice.adapters) == (30, 30, 6)
    assert twice.min_score == once.min_score
    assert twice.by_cosine == once.by_cosine


def test_samples_that_the_encoder_was_trained_on_set_no_bound_while_there_are_others() -> None:
    world = World(np.random.default_rng(5), tasks=12)
    tasks, vectors = world.pool(20)
    trained = {task.name: np.repeat(mean_vector(vectors[task.name])[None], 20, axis=0) for task in tasks[:6]}
    seen = calibrate(tasks, vectors | trained, false_abstain=0.1)
    told = calibrate(tasks, vectors | trained, false_abstain=0.1, trained=trained)
    assert (seen.samples, told.samples) == (240, 120)
    assert told.min_score < seen.min_score
    all_trained = calibrate(tasks, vectors, trained=[task.name for task in tasks])
    assert all_trained.samples == 240
    assert any("trained on" in warning for warning in all_trained.warnings)


def test_an_adapter_without_kept_samples_fits_by_its_cosine() -> None:
    rule = FitRule(weight=1.0, min_fit=5.0, min_score=0.3)
    fits = rule.fits([0.9, 0.4, 0.2], grams("some words"), [profile(["some words"]), None, None])
    assert fits.tolist() == [False, True, False]


def test_a_rule_is_kept_as_text() -> None:
    rule = FitRule(0.25, 0.328064, -1.0)
    assert FitRule.of_text(rule.as_text()) == rule


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.3", None])
def test_a_rule_of_anything_but_numbers_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="min_fit"):
        FitRule(1.0, value, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan"), True, "0.1"])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigurationError, match="false_abstain"):
        calibrate([Task("a", ("x",))], {"a": axis(0, 1)}, false_abstain=share)


def test_no_task_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(SamplesError):
        calibrate([], {})
    with pytest.raises(ConfigurationError, match="one name"):
        calibrate([Task("a", ("x",)), Task("a", ("y",))], {"a": axis(0, 1)})


def test_wording_falls_with_what_nobody_else_says() -> None:
    known = [profile(["translate this word", "translate this line"]), profile(["add these numbers"])]
    same, longer, other = (
        wording(grams(text), known) for text in ("translate this", "translate this zebra crossing", "zebra crossing")
    )
    assert same[0] > longer[0] > other[0] == 0.0
    assert same[0] > same[1]
    assert np.isnan(wording(grams("x"), [None])).all()
    assert np.isnan(wording(grams(" "), known)).all()


def test_samples_are_embedded_and_the_result_is_plain(encoder: SentenceEncoder) -> None:
    tasks = [
        Task("dates", tuple(f"Write {day} May 1968 as an ISO date" for day in range(1, 9))),
        Task("moods", tuple(f"Is this review good or bad? The {what} was fine" for what in "abcdefgh")),
    ]
    found = calibrate_encoder(encoder, tasks, false_abstain=0.2, skipped=3)
    assert found == calibrate(
        tasks, {task.name: encoder.encode(task.inputs) for task in tasks}, false_abstain=0.2, skipped=3
    )
    data = found.as_dict()
    assert set(data) == set(Calibration.__dataclass_fields__)
    assert data["rule"] == {"weight": found.rule.weight, "min_fit": found.rule.min_fit, "min_score": found.min_score}


def drawn(template: str, *choices: Sequence[object], count: int = 18) -> list[str]:
    """Distinct texts, drawn alike."""
    dice = random.Random(template)
    every = [template.format(*filled) for filled in itertools.product(*choices)]
    return dice.sample(every, count)


DATES = drawn("Write the date {} {} {} in ISO form", range(1, 29), ("May", "July", "March", "June"), range(1950, 2000))
MOODS = drawn(
    "Is this review positive or negative? The {} was {} and the {} was {}",
    *(("food", "room", "film", "crew", "price"), ("awful", "lovely", "fine", "dull", "great")) * 2,
)
SUMS = drawn("What is {} plus {}? Answer with a number.", range(2, 99), range(2, 99))
#: Of each task, what its adapter never sees.
KEPT_BACK = 6


@pytest.fixture
def pool(open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path) -> LoraHub:
    """Three adapters of twelve samples."""
    hub = open_hub(index="exact")
    for name, texts in {"dates": DATES, "moods": MOODS, "sums": SUMS}.items():
        hub.register(tiny_adapter(tmp_path / name, base), name=name, samples=texts[KEPT_BACK:])
    return hub


def test_what_fits_is_routed_and_a_stranger_is_left_to_the_base_model(pool: LoraHub, base: Path) -> None:
    found = pool.calibrate(false_abstain=0.1)
    assert (found.samples, found.adapters, found.skipped) == (36, 3, 0)
    fitting = [*DATES[:KEPT_BACK], *MOODS[:KEPT_BACK], *SUMS[:KEPT_BACK]]
    wanted = [["dates"]] * KEPT_BACK + [["moods"]] * KEPT_BACK + [["sums"]] * KEPT_BACK
    strangers = ["def quicksort(items):", "zebra crossing", "Summarise the novel Moby Dick for a child"]
    for strategy in ("selection", "mixture", "fusion"):
        for rerank in (False, True):
            routing = Routing(strategy, min_score="auto", rerank=rerank)
            routes = pool.route([*fitting, *strangers], base_model=base, routing=routing)
            found_names = [[member.adapter.name for member in route.members] for route in routes]
            assert found_names[len(fitting) :] == [[], [], []]
            right = [names == want for names, want in zip(found_names[: len(fitting)], wanted, strict=True)]
            assert sum(right) >= 15  # of 18, a tenth of which may be given away


def test_a_bound_is_kept_for_every_process_and_for_one_namespace_and_encoder(
    pool: LoraHub, open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    auto = Routing(min_score="auto")
    with pytest.raises(ConfigurationError, match=r"hub\.calibrate"):
        pool.route(["x"], base_model=base, routing=auto)
    before = pool.digest
    pool.calibrate(false_abstain=0.1)
    assert pool.digest != before
    event = pool.events(limit=1)[0]
    assert (event.action, event.namespace) == ("calibrated", "default")
    other = open_hub(index="exact")
    assert other.route([DATES[0]], base_model=base, routing=auto)[0].members
    other.register(tiny_adapter(tmp_path / "b", base), name="b", namespace="elsewhere", samples=["x y", "x z"])
    with pytest.raises(ConfigurationError, match="'elsewhere'"):
        other.route(["x"], base_model=base, routing=Routing(min_score="auto", namespace="elsewhere"))
    assert other.verify().agrees
    assert [hit.adapter.name for hit in other.search(DATES[0], k=1)] == ["dates"]


def test_the_last_calibration_counts(pool: LoraHub, base: Path) -> None:
    prompt, auto = "zebra crossing", Routing(min_score="auto")
    pool.calibrate(false_abstain=0.01)  # of 36 samples none may be given away: everything fits
    assert len(pool.route([prompt], base_model=base, routing=auto)[0].members) == 3
    pool.calibrate(false_abstain=0.1)
    assert not pool.route([prompt], base_model=base, routing=auto)[0].members


def test_adapters_without_kept_samples_are_skipped_and_told(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    private = ["Ask the oracle of Delphi about ships", "Ask the oracle of Delphi about wars"]
    pool.register(tiny_adapter(tmp_path / "private", base), name="private", samples=private, keep_samples=False)
    pool.retire("sums")
    found = pool.calibrate(false_abstain=0.1)
    assert (found.adapters, found.skipped, found.samples) == (2, 1, 24)
    (route,) = pool.route([private[0]], base_model=base, routing=Routing("selection", min_score="auto"))
    assert [member.adapter.name for member in route.members] == ["private"]


def test_without_a_calibration_of_the_registry_the_encoders_own_bound_counts(
    pool: LoraHub, open_hub: Callable[..., LoraHub], encoder: SentenceEncoder, base: Path
) -> None:
    settings = RetrieverSettings(min_score=0.6)
    own = SentenceEncoder(resolve_model("all-minilm-l6-v2"), settings=settings)
    assert own.fingerprint == encoder.fingerprint
    hub = open_hub(index="exact", encoder=own)
    prompts = [DATES[0], "zebra crossing"]
    by_number, by_encoder = (
        hub.route(prompts, base_model=base, routing=Routing(min_score=floor)) for floor in (0.6, "auto")
    )
    assert by_encoder == by_number
    assert [bool(route.members) for route in by_encoder] == [True, False]


@pytest.mark.parametrize("floor", ["high", True, float("nan"), "0.3"])
def test_a_floor_that_is_none_is_refused(pool: LoraHub, base: Path, floor: object) -> None:
    with pytest.raises(ConfigurationError, match="min_score"):
        pool.route(["x"], base_model=base, routing=Routing(min_score=floor))  # type: ignore[arg-type]


class World:
    """Tasks with words and a direction of their own, from which texts and vectors are drawn alike, again and again."""

    def __init__(self, dice: np.random.Generator, *, tasks: int, spread: float = 1.0) -> None:
        self._dice, self._spread, self._tasks = dice, spread, tasks
        self._centres = dice.normal(size=(tasks, 16))

    def draw(self, task: int, count: int) -> tuple[list[str], Vectors]:
        texts = [
            " ".join(
                [
                    *(f"say{task} this{task} of{task}".split()),
                    *(f"own{task}x{self._dice.integers(40)}" for _ in range(3)),
                    f"any{self._dice.integers(10**9)}",
                ]
            )
            for _ in range(count)
        ]
        rows = self._centres[task] + self._spread * self._dice.normal(size=(count, 16))
        return texts, units(rows)

    def pool(self, samples: int) -> tuple[list[Task], dict[str, Vectors]]:
        drawn = {str(task): self.draw(task, samples) for task in range(self._tasks)}
        return [Task(name, tuple(texts)) for name, (texts, _) in drawn.items()], {
            name: rows for name, (_, rows) in drawn.items()
        }


def axis(place: int, count: int) -> Vectors:
    rows = np.zeros((count, 4), dtype=np.float32)
    rows[:, place] = 1.0
    return rows


def near(dice: np.random.Generator, count: int, spread: float) -> Vectors:
    rows = dice.normal(size=8) + spread * dice.normal(size=(count, 8))
    return units(rows)


def units(rows: NDArray[np.float64]) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)
