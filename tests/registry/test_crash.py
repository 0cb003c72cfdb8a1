"""A process that is killed at any moment leaves a registry that is whole, and forgets nothing that it confirmed."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

import pytest
from _pytest.mark import ParameterSet

from lora_hub_sdk.testing import LocalHub
from tests.registry.grounds import Grounds
from tests.registry.lives import Life, Offer, die_at, read_phase, reopen, work
from tests.registry.report import Collected, Held, Report, content_of, replayed
from tests.registry.worker import Call

State = Mapping[str, Held]
#: Seconds until each answer of the Hub, so that a kill may well hit a download.
_DELAY: Final = 0.002
#: Seconds of random calls after which a worker is killed at the latest.
_LONGEST_LIFE: Final = 0.5


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub() as started:
        yield started


@pytest.fixture
def grounds(tmp_path: Path, base: Path, server: LocalHub) -> Grounds:
    made = Grounds(tmp_path, base, server)
    for number in range(5):
        made.publish(f"user/lora-{number}")
    for number in range(2):
        made.lay(f"local-{number}")
    server.delay(_DELAY)
    return made


def after(grounds: Grounds, state: State, call: Call) -> State:
    """What the registry is to hold once a call has done its work."""
    held = state.get(call.name)
    if call.kind == "register":
        revision = call.revision or grounds.newest(call.source)
        content = grounds.contents[call.source, revision]
        return {**state, call.name: Held(call.source, revision, "active", call.samples or (), content, Path())}
    if held is None or call.kind in ("search", "gc", "score"):
        return state
    if call.kind == "remove":
        return {name: other for name, other in state.items() if name != call.name}
    if call.kind == "update":
        revision = call.revision or grounds.newest(held.source)
        content = grounds.contents[held.source, revision]
        held = replace(held, revision=revision, content=content, samples=call.samples or held.samples)
    else:
        held = replace(held, state="retired" if call.kind == "retire" else "active")
    return {**state, call.name: held}


def check(report: Report | None, expected: Sequence[State], about: object) -> State:
    """The one of the expected states that was found; everything else in the report must agree with it."""
    assert report is not None
    assert not report.problems, (report.problems, about)
    told = replayed(report.events)
    assert told == {name: (held.revision, held.state) for name, held in report.adapters.items()}, about
    assert report.adapters in expected, (report.adapters, expected, about)
    return report.adapters


def check_collected(collected: Collected | None, about: object) -> None:
    assert collected is not None
    assert collected.freed == collected.told, about
    assert collected.freed.size_bytes == collected.before - collected.after, (collected, about)
    assert (collected.leftovers, collected.freed.busy) == ([], ()), (collected, about)


def contents(folders: Mapping[str, Path]) -> dict[str, str]:
    return {name: content_of(folder) for name, folder in folders.items()}


# -- at random ---------------------------------------------------------------------------------------------------------


def survive(grounds: Grounds, kills: int, seed: int, tmp_path: Path) -> Counter[str]:
    """Kill a worker again and again, and check after each death; returns how often each step was the last."""
    random, phase, local = Random(seed), tmp_path / "phase", contents(grounds.folders)
    phases: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    possible: list[State] = [{}]
    offer = Offer(grounds.repositories, {name: str(folder) for name, folder in grounds.folders.items()})
    for number in range(kills):
        life = Life(work, grounds.place, offer, random.getrandbits(32), phase)
        about = f"seed {seed}, life {number}, {phases}"
        # Now and then it dies while it opens and compares, and has said nothing.
        if random.random() < 0.8:
            life.hear()
        life.hear_for(random.uniform(0, _LONGEST_LIFE))
        life.kill()
        phases[read_phase(phase) or "starting"] += 1
        for told in life.told:
            assert told.what != "failed", (told.error, about)
            if told.what == "found":
                possible = [check(told.report, possible, about)]
            elif told.what == "begins":
                assert told.call is not None
                possible = [possible[-1], after(grounds, possible[-1], told.call)]
            else:
                assert told.call is not None
                calls[told.call.kind] += 1
                possible = possible[-1:]
    last = Life(reopen, grounds.place)
    assert last.end() == 0, (last.told, seed)
    state = check(last.told[0].report, possible, f"seed {seed}, at the end")
    check_collected(last.told[1].collected, f"seed {seed}")
    check(last.told[2].report, [state], f"seed {seed}, after the collection")
    assert contents(grounds.folders) == local
    print(f"seed {seed}: killed at {dict(phases)}; calls done: {dict(calls)}")  # noqa: T201 (shown where it fails)
    return phases


def test_whatever_was_confirmed_outlives_kills_at_any_moment(grounds: Grounds, tmp_path: Path) -> None:
    phases = survive(grounds, 8, int.from_bytes(os.urandom(4)), tmp_path)
    assert len(phases) > 2


@pytest.mark.slow
def test_whatever_was_confirmed_outlives_two_hundred_kills(grounds: Grounds, tmp_path: Path) -> None:
    phases = survive(grounds, 200, int.from_bytes(os.urandom(4)), tmp_path)
    assert len(phases) > 15


# -- at one step -------------------------------------------------------------------------------------------------------

_ONE: Final = ("one sample", "and another")
_TWO: Final = ("two samples", "and no more")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Grounds]:
    """One registry for all steps, as what one death leaves behind must trouble nobody later."""
    with LocalHub() as started:
        yield Grounds(tmp_path_factory.mktemp("steps"), base, started)


def registered(samples: tuple[str, ...] = _ONE) -> Call:
    return Call("register", "?", "?", samples=samples)


def first() -> Call:
    return Call("register", "?", "?", "first", _ONE)


def updated(samples: tuple[str, ...] | None = _TWO) -> Call:
    return Call("update", "?", samples=samples)


def then_searched(call: Call) -> tuple[Call, ...]:
    return call, Call("search", "?", samples=_ONE)


_REMOVED: Final = Call("remove", "?")
_COLLECTED: Final = Call("gc")
#: What is called before, what is called, the step, the how-many-eth of it, and whether the change is there afterwards.
_DEATHS: Final[list[tuple[Sequence[Call], Sequence[Call], str, int, bool]]] = [
    *(
        ((), then_searched(registered()), step, 1, True)
        for step in ("before recording a partition", "before the stamp")
    ),
    *(((), [registered()], step, 1, False) for step in ("resolving", "resolved", "download noted", "file arrived")),
    *(((), [registered()], "file arrived", count, False) for count in (2, 3)),
    *(((), [registered()], step, count, False) for step in ("file stored", "file linked") for count in (1, 3)),
    *(((), [registered()], "after a file", count, False) for count in (1, 2, 3)),
    *(
        ((), [registered()], step, 1, False)
        for step in ("branch drafted", "pulled", "admitting", "admitted", "embedding", "before the transaction")
    ),
    # The first statement notes the download.
    *(((), [registered()], "statement written", count, False) for count in (2, 4, 6, 8)),
    ((), [registered()], "before the commit", 1, False),
    ((), [registered()], "committed", 1, True),
    *(([first()], [updated()], "statement written", count, False) for count in (2, 4, 6, 8)),
    *(([first()], [updated()], step, 1, False) for step in ("after a file", "pulled", "before the commit")),
    ([first()], [updated(None)], "before the commit", 1, False),
    ([first()], [updated()], "committed", 1, True),
    *(([first()], [call], "before the commit", 1, False) for call in (_REMOVED, Call("retire", "?"))),
    *(([first()], [call], "committed", 1, True) for call in (_REMOVED, Call("retire", "?"))),
    ([first(), Call("retire", "?")], [Call("restore", "?")], "before the commit", 1, False),
    *(
        ([], then_searched(registered()), step, 1, True)
        for step in ("before putting vectors", "vectors put", "stamped", "searching")
    ),
    *(
        ([first()], then_searched(updated()), step, 1, True)
        for step in (
            "before deleting vectors", "vectors deleted", "before putting vectors", "vectors put", "before the stamp",
            "stamped",
        )
    ),
    *(
        ([first()], then_searched(_REMOVED), step, 1, True)
        for step in ("before deleting vectors", "vectors deleted", "before the stamp")
    ),
    *(
        ([first(), updated()], [_COLLECTED], step, count, True)
        for step, count in (
            ("before collecting", 1), ("something removed", 1), ("something removed", 2),
            ("files removed", 1), ("pull forgotten", 1),
        )
    ),
    *(
        ([first(), _REMOVED], [_COLLECTED], step, 1, True)
        for step in ("before collecting", "something removed", "files removed", "pull forgotten")
    ),
]  # fmt: skip


def deaths() -> Iterator[ParameterSet]:
    """Each step of each call once among the quick tests."""
    known = set()
    for death in _DEATHS:
        _, calls, step, count, _ = death
        place = f"{'-'.join(call.kind for call in calls)}: {step}"
        yield pytest.param(death, id=f"{place} {count}", marks=[pytest.mark.slow] if place in known else [])
        known.add(place)


@pytest.mark.parametrize("death", [*deaths()])
def test_a_death_at_a_step_leaves_all_of_a_change_or_nothing(
    ground: Grounds, death: tuple[Sequence[Call], Sequence[Call], str, int, bool]
) -> None:
    prepare, calls, step, count, landed = death
    repo_id = f"user/lora-{len(ground.repositories)}"
    ground.publish(repo_id)

    def about_it(call: Call) -> Call:
        revision = ground.repositories[repo_id][0] if call.revision == "first" else call.revision
        samples = None if call.samples is None else tuple(f"{repo_id}: {text}" for text in call.samples)
        return replace(call, name=repo_id, source=call.source and repo_id, revision=revision, samples=samples)

    # An adapter registered by its commit follows no branch; here it is to be moved to the newest one.
    prepare, calls = [*map(about_it, prepare)], [*map(about_it, calls)]
    victim = Life(die_at, ground.place, prepare, calls, step, count)
    assert victim.end() == -signal.SIGKILL, (victim.told, f"{step} was never reached")
    assert [told.what for told in victim.told] == ["found"], victim.told
    report = victim.told[0].report
    assert report is not None
    before: State = report.adapters
    done = before
    for call in calls:
        done = after(ground, done, call)
    # Removed at the end, so that the registry stays small.
    rest = [Call("remove", repo_id)] if repo_id in done else []
    heir = Life(reopen, ground.place, [] if landed else calls, rest, repo_id)
    assert heir.end() == 0, heir.told
    check(heir.told[0].report, [done if landed else before], step)
    check(heir.told[2].report, [done], step)
    check_collected(heir.told[1].collected, step)
