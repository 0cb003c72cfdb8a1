"""A run of the benchmark on a tiny pool: as the hub answers, each equal route once, and resumed after any end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hub_sdk.composition.ramole import Ramole, RouterLora
from lora_hub_sdk.errors import ConfigurationError, MissingExtraError
from lora_hub_sdk.evaluation.answers import ANSWERS_FILE, Answer
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.metrics import METRICS
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.record import RunRecord
from lora_hub_sdk.evaluation.results import Results
from lora_hub_sdk.evaluation.run import run
from lora_hub_sdk.types import Routing, Sampling
from tests.evaluation.pool import Pool, make_pool

SHORT = dict.fromkeys(METRICS, 4)
RETRIEVED = ("base", "perfect", "selection", "mixture", "fusion", "mixture-ood")


@dataclass(frozen=True)
class Named:
    """A system of a test: the same routing for each row, or what ``of`` says."""

    name: str
    routing: Routing | None = None
    before: Callable[[Ground], object] = lambda ground: None
    of: Callable[[MixedRow], Routing | None] | None = None
    learns: bool = False

    def prepare(self, ground: Ground) -> None:
        self.before(ground)

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        return [self.of(row) if self.of else self.routing for row in rows]


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = make_pool(tmp_path_factory.mktemp("pool"), base)
    yield made
    made.hub.close()


def ask(pool: Pool, output: Path, systems: Sequence[Any] = RETRIEVED, **options: Any) -> Results:
    ground = options.pop("ground", None) or pool.ground(output / "learned")
    options = {"max_new_tokens": SHORT, **options}
    return run(ground, options.pop("questions", pool.questions), systems, output=output, **options)


def told(results: Results) -> dict[tuple[str, int], dict[str, Any]]:
    """All that must not depend on how often the run was interrupted."""
    found = {(one.system, one.question): one.as_dict() for one in results.answers}
    return {key: {name: one[name] for name in one if name != "same_as"} for key, one in sorted(found.items())}


def of(results: Results, system: str) -> list[Answer]:
    return [one for one in results.answers if one.system == system]


def refuse(error: Exception) -> Callable[[Ground], object]:
    def prepare(ground: Ground) -> None:
        raise error

    return prepare


def test_each_question_is_answered_as_the_hub_answers_it(pool: Pool, tmp_path: Path) -> None:
    results = ask(pool, tmp_path, batch=5)
    rows = pool.questions.rows
    assert len(results.answers) == len(RETRIEVED) * len(rows)
    routings: dict[str, Callable[[MixedRow], Routing]] = {
        "base": lambda row: Routing("base"),
        "perfect": lambda row: Routing("selection", adapters=(row.task,)),
        "selection": lambda row: Routing("selection"),
        "mixture": lambda row: Routing("mixture"),
        "fusion": lambda row: Routing("fusion"),
        "mixture-ood": lambda row: Routing("mixture", exclude=(row.task,)),
    }
    for system, routing in routings.items():
        ones = {one.question: one for one in of(results, system) if one.text is not None}
        asked = [rows[place] for place in ones]
        assert len(ones) == (len(rows) if system != "perfect" else sum(row.task in pool.own for row in rows))
        found = pool.hub.generate(
            [row.inputs for row in asked],
            base_model=pool.base,
            routing=[routing(row) for row in asked],
            sampling=Sampling(4),
        )
        for row, one, completion in zip(asked, ones.values(), found, strict=True):
            assert (one.text, one.tokens) == (completion.text, completion.usage.completion_tokens)
            assert (one.task, one.domain, one.metric) == (row.task, row.domain, row.metric)
            assert (one.route, one.finish_reason) == (completion.trace.route.as_dict(), completion.finish_reason)
            assert one.score == METRICS[row.metric].of(completion.text, row.targets)
            assert set(one.scores) == set(METRICS[row.metric].companions)
    unowned = [one for one in of(results, "perfect") if one.task not in pool.own]
    assert [(one.text, one.score, one.route, one.error) for one in unowned] == [(None, None, None, None)] * 2
    assert len({one.text for one in results.answers}) > 30


def test_equal_routes_of_a_question_are_answered_once(pool: Pool, tmp_path: Path) -> None:
    ones = [
        Named("first", Routing("selection", adapters=("french",))),
        Named("second", Routing("fusion", adapters=("french",))),
        Named("halves", Routing("mixture", adapters=("french",), adapter_weights=(0.5,))),
        Named("pair", Routing("mixture", adapters=("french", "mood"))),
        Named("fused", Routing("fusion", adapters=("french", "mood"))),
    ]
    results = ask(pool, tmp_path, ones)
    count = len(pool.questions)
    assert results.record.answered == 4 * count
    assert {(one.system, one.same_as) for one in results.answers} == {
        ("first", None),
        ("second", "first"),
        ("halves", None),
        ("pair", None),
        ("fused", None),
    }
    texts = {(one.system, one.question): one.text for one in results.answers}
    assert all(texts["first", place] == texts["second", place] for place in range(count))
    later = ask(pool, tmp_path, [Named("third", Routing("selection", adapters=("french",)))], listed=False)
    assert later.record.answered == 4 * count
    assert {one.same_as for one in later.answers if one.system == "third"} == {"first"}
    assert later.record.listed == ("first", "second", "halves", "pair", "fused")


def test_a_run_that_was_cut_off_asks_what_is_missing_and_ends_the_same(pool: Pool, tmp_path: Path) -> None:
    whole = ask(pool, tmp_path / "whole")
    content = (tmp_path / "whole" / ANSWERS_FILE).read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    path = tmp_path / "cut" / ANSWERS_FILE
    path.write_bytes(content[: len(content) // 2])
    kept = content[: len(content) // 2].count(b"\n")
    resumed = ask(pool, tmp_path / "cut")
    assert told(resumed) == told(whole)
    assert path.read_bytes().count(b"\n") == content.count(b"\n")
    assert 0 < resumed.record.answered - whole.record.answered <= content.count(b"\n") - kept
    again = ask(pool, tmp_path / "cut")
    assert again.record.answered == resumed.record.answered
    assert path.read_bytes().count(b"\n") == content.count(b"\n")


KILLED = """
import sys
from pathlib import Path
from tests.evaluation.pool import make_pool
from lora_hub_sdk.evaluation.metrics import METRICS
from lora_hub_sdk.evaluation.run import run

folder, base, output = map(Path, sys.argv[1:])
pool = make_pool(folder, base)
systems = ("base", "perfect", "selection", "mixture", "fusion", "mixture-ood")
run(
    pool.ground(output / "learned"), pool.questions, systems, output=output,
    max_new_tokens=dict.fromkeys(METRICS, 64), batch=2,
)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(pool: Pool, base: Path, tmp_path: Path) -> None:
    output, lengths = tmp_path / "run", dict.fromkeys(METRICS, 64)
    # The killed process has a registry of its own, with the same content at the same place.
    program = [sys.executable, "-c", KILLED, str(tmp_path / "pool"), str(base), str(output)]
    (tmp_path / "pool").mkdir()
    # More questions than one: the file must be met half full.
    process = subprocess.Popen(program, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"})
    path = output / ANSWERS_FILE
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 20):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    assert 20 < kept.count(b"\n") < len(RETRIEVED) * len(pool.questions)
    before = RunRecord.read(output).answered
    resumed = ask(pool, output, max_new_tokens=lengths)
    whole = ask(pool, tmp_path / "whole", max_new_tokens=lengths)
    strip = ("repo_id", "revision")
    ends = [
        {
            key: (one["answer"], one["score"], one["key"], [{**m, **dict.fromkeys(strip)} for m in members])
            for key, one in told(results).items()
            for members in [(one["route"] or {"adapters": []})["adapters"]]
        }
        for results in (resumed, whole)
    ]
    assert ends[0] == ends[1]
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert resumed.record.answered - before < whole.record.answered


def test_two_runs_at_once_on_one_folder_are_refused(pool: Pool, tmp_path: Path) -> None:
    inner: list[str] = []

    def again(ground: Ground) -> None:
        with pytest.raises(ConfigurationError, match="another run works on this folder") as caught:
            ask(pool, tmp_path, ["base"])
        inner.append(str(caught.value))

    results = ask(pool, tmp_path, [Named("outer", Routing("base"), again)])
    assert len(inner) == 1
    assert len(results.answers) == len(pool.questions)
    ask(pool, tmp_path, ["base"])


def test_a_question_that_fails_is_kept_with_its_error_and_asked_again(base: Path, tmp_path: Path) -> None:
    pool = make_pool(tmp_path, base)
    with pool.hub:
        shutil.move(pool.folders["mood"], tmp_path / "away")
        failed = ask(pool, tmp_path / "run", ["perfect", "base"])
        assert {one.task for one in failed.errors} == {"mood"}
        assert all(one.error and one.error.startswith("AdapterChangedError: ") for one in failed.errors)
        assert all(one.route and one.route["adapters"][0]["name"] == "mood" for one in failed.errors)
        assert {one.text for one in failed.errors} == {None}
        assert sum(one.text is not None for one in failed.answers) == 10 + 14
        shutil.move(tmp_path / "away", pool.folders["mood"])
        healed = ask(pool, tmp_path / "run", ["perfect", "base"])
        assert healed.errors == ()
        assert told(healed) == told(ask(pool, tmp_path / "new", ["perfect", "base"]))


def test_a_question_that_cannot_be_routed_leaves_the_others_alone(pool: Pool, tmp_path: Path) -> None:
    rows = [replace(row, inputs=" ") if place in (3, 8) else row for place, row in enumerate(pool.questions.rows)]
    lost = Named("lost", of=lambda row: Routing("selection", adapters=("nobody" if row.task == "past" else "past",)))
    results = ask(pool, tmp_path, ["selection", lost], questions=MixedSet(tuple(rows)))
    errors = {(one.system, one.question): one.error for one in results.errors}
    past = [place for place, row in enumerate(rows) if row.task == "past"]
    assert set(errors) == {("selection", 3), ("selection", 8), *(("lost", place) for place in {3, 8, *past})}
    assert all(text and text.startswith("EmptyPromptError: ") for key, text in errors.items() if key[1] in (3, 8))
    assert len(results.answers) == 2 * len(rows)
    lines = (tmp_path / ANSWERS_FILE).read_bytes()
    ask(pool, tmp_path, ["selection", lost], questions=MixedSet(tuple(rows)))
    assert (tmp_path / ANSWERS_FILE).read_bytes() == lines


def test_a_system_that_cannot_run_stops_the_run_or_is_left_out(pool: Pool, tmp_path: Path) -> None:
    ones: list[Named | str] = [
        "base",
        Named("poor", Routing("base"), refuse(ConfigurationError("nothing to learn from"))),
        Named("bare", Routing("base"), refuse(MissingExtraError("poetry", "poems"))),
        Named("odd", Routing("ramole")),
    ]
    results = ask(pool, tmp_path, ones, strict=False)
    assert {one.system for one in results.answers} == {"base"}
    assert list(results.record.left_out) == ["poor", "bare", "odd"]
    assert results.record.left_out["poor"] == "nothing to learn from"
    assert "needs a gate" in results.record.left_out["odd"]
    with pytest.raises(ConfigurationError, match="system 'poor' cannot run: nothing to learn from"):
        ask(pool, tmp_path, ones[:2])
    with pytest.raises(MissingExtraError, match="poetry"):
        ask(pool, tmp_path, [ones[2]])
    rich = Named("poor", Routing("base"))
    assert "poor" not in ask(pool, tmp_path, [rich]).record.left_out


def test_a_folder_of_another_run_is_refused_and_what_differs_is_named(pool: Pool, tmp_path: Path) -> None:
    ask(pool, tmp_path, ["base"])
    lines = (tmp_path / ANSWERS_FILE).read_bytes()
    with pytest.raises(ConfigurationError, match="another run: its questions"):
        ask(pool, tmp_path, ["base"], questions=MixedSet(pool.questions.rows[1:]))
    with pytest.raises(ConfigurationError, match=r'its longest answers .*"em": 4.*not .*"em": 16'):
        ask(pool, tmp_path, ["base"], max_new_tokens={})
    with pytest.raises(ConfigurationError, match=r"its template auto, not alpaca; its tasks' own adapters"):
        ask(pool, tmp_path, ["base"], ground=pool.ground(tmp_path / "learned", template="alpaca", own={}))
    taught = replace(pool.ground(tmp_path / "learned"), training=MixedSet(pool.training.rows[1:]))
    with pytest.raises(ConfigurationError, match="its training rows"):
        ask(pool, tmp_path, ["base"], ground=taught)
    assert (tmp_path / ANSWERS_FILE).read_bytes() == lines


def test_arguments_that_make_no_sense_are_refused_before_anything_is_written(pool: Pool, tmp_path: Path) -> None:
    def refused(match: str, systems: Sequence[Any] = ("base",), **options: Any) -> None:
        with pytest.raises(ConfigurationError, match=match):
            ask(pool, tmp_path / "run", systems, ground=pool.ground(tmp_path), **options)

    refused("expected a list", "base")
    refused("expected a list", [])
    refused("nobody", ["nobody"])
    refused("batch=0", batch=0)
    refused("no question", questions=MixedSet(()))
    refused("max_new_tokens", max_new_tokens={"em": 0})
    refused("metric 'taste'", questions=MixedSet((MixedRow("a", "b", "t", "d", "taste"),)))
    assert not (tmp_path / "run").exists()


def test_two_systems_with_different_gates_for_one_strategy_are_not_mixed_up(pool: Pool, tmp_path: Path) -> None:
    def use_gate(seed: int, ground: Ground) -> None:
        draw = torch.Generator().manual_seed(seed)
        routers = {
            path: RouterLora(torch.randn(4, d_in, generator=draw), torch.randn(d_out, 4, generator=draw))
            for path, (d_out, d_in) in pool.hub.engine(pool.base).base.shapes.items()
            if "q_proj" in path
        }
        ground.hub.use_gate(Ramole(pool.hub.list()[0].base_model, routers))

    members = Routing("ramole", adapters=("french", "past"))
    ones = [Named(f"gate {seed}", members, partial(use_gate, seed)) for seed in (0, 1)]
    with pytest.raises(ConfigurationError, match="'gate 0' and 'gate 1' use different gates"):
        ask(pool, tmp_path, ones)
    for one in ones:
        results = ask(pool, tmp_path, [one])
    keys: dict[str, set[str | None]] = {one.name: {answer.key for answer in of(results, one.name)} for one in ones}
    assert not keys["gate 0"] & keys["gate 1"]
    pool.hub.use_gate(None, base_model=pool.base)


def test_what_a_run_is_told_and_how_long_it_took_is_in_its_record(pool: Pool, tmp_path: Path) -> None:
    slow = Named("slow", Routing("base"), lambda ground: time.sleep(0.01), learns=True)
    ground = pool.ground(tmp_path / "learned")
    results = ask(pool, tmp_path, ["base", slow], ground=ground, told={"date": "today"})
    record = RunRecord.read(tmp_path)
    assert record == results.record
    assert record.systems["slow"].learns
    assert record.systems["slow"].prepare_s > 0
    assert record.answer_s > 0
    assert record.answered == len(pool.questions)
    assert record.tokens == sum(one.tokens for one in of(results, "base"))
    assert (record.adapters, record.own, record.training) == (6, pool.own, pool.training.digest)
    assert record.told == {"date": "today"}
    assert Results.read(tmp_path).questions == pool.questions
