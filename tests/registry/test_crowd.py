"""Many processes and threads work on one registry at once: nothing is lost, doubled, stale or mixed."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lora_hub_sdk.engine.adapter_store import AdapterStore
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import LocalHub
from lora_hub_sdk.types import Event, Routing, Sampling
from tests.registry.crowd import RACES, join, open_new
from tests.registry.grounds import Grounds
from tests.registry.lives import Life
from tests.registry.report import Diary, content_of, look, replayed
from tests.registry.worker import Call, Place, forking

_PROCESSES = 8
_EVENT_OF = {"register": "registered", "update": "updated", "remove": "removed", "score": "scored"}


@pytest.fixture(params=["chroma server", "postgres", "exact"])
def grounds(request: pytest.FixtureRequest, tmp_path: Path, base: Path) -> Iterator[Grounds]:
    """Four repositories, and a registry of one of three kinds; nobody has opened it yet."""
    with LocalHub() as server:
        made = Grounds(tmp_path, base, server)
        for number in range(4):
            made.publish(f"user/lora-{number}")
        index = "exact" if request.param == "exact" else request.getfixturevalue("chroma_server")
        database = request.getfixturevalue("postgres") if request.param == "postgres" else made.place.database
        made.place = replace(made.place, index=index, database=database)
        yield made


def gather(grounds: Grounds, seconds: float) -> list[Diary]:
    """Let the crowd work; returns their diaries."""
    context = forking()
    together = context.Barrier(_PROCESSES)
    pipes = [context.Pipe() for _ in range(_PROCESSES)]
    shared = (grounds.place, grounds.repositories, seconds, together)
    lives = [Life(join, number, *shared, pipes[number][0], pipes[number - 1][1]) for number in range(_PROCESSES)]
    for ends in pipes:
        for end in ends:
            end.close()
    exits = [life.end() for life in lives]
    errors = [told.error for life in lives for told in life.told if told.what == "failed"]
    assert not errors, "\n".join(errors)
    assert exits == [0] * _PROCESSES
    return [told.diary for life in lives for told in life.told if told.diary is not None]


def check(grounds: Grounds, diaries: list[Diary]) -> None:
    counts = [dict(diary.counts) for diary in diaries]
    print(*counts, sep="\n")  # noqa: T201 (shown where it fails)
    total = sum((diary.counts for diary in diaries), Counter[str]())
    wanted = {*_EVENT_OF, "retire", "restore", "search", "gc", "claim checked"}
    assert wanted <= total.keys(), counts
    with replace(grounds.place, index="exact").open("judge") as hub:
        events = hub.events(limit=1_000_000)[::-1]
        adapters = {adapter.name: adapter for adapter in hub.list()}
        # The version counts changes, and each of them has left its event.
        assert int(hub.digest.split(":")[1]) == len(events)
        assert replayed(events) == {name: (adapter.revision, adapter.state) for name, adapter in adapters.items()}
        check_races(events, diaries)
        last = check_changes(events, diaries)
        for name, adapter in adapters.items():
            if name in last:
                assert hub.samples(name) == last[name].samples, (name, last[name])
            assert content_of(adapter.folder) == grounds.contents[adapter.repo_id, adapter.revision], adapter
        texts = [f"shared-{count}: probe" for count in range(4)]
        exact = [[(hit.adapter.name, hit.adapter.revision) for hit in row] for row in hub.search_many(texts, k=5)]
    for number, diary in enumerate(diaries):
        assert diary.verified is not None
        assert diary.verified.agrees, (number, diary.verified)
        assert diary.hits == exact, number


def check_races(events: list[Event], diaries: list[Diary]) -> None:
    """Each name that all registered at once was registered by one, and the others got that one or were refused."""
    for count in range(RACES):
        for name in (f"race-{count}", f"rival-{count}"):
            assert [event.action for event in events if event.name == name] == ["registered"]
            found = [number for diary in diaries for known, number in diary.races if known == name]
            assert len({number for number in found if number is not None}) == 1, (name, found)
            assert found.count(None) == (0 if name.startswith("race") else _PROCESSES // 2), (name, found)


def check_changes(events: list[Event], diaries: list[Diary]) -> dict[str, Call]:
    """Every process's confirmed changes are its events; returns the last call that gave samples, by name."""
    by_actor = defaultdict(list)
    for event in events:
        if event.action in _EVENT_OF.values() and not event.name.startswith(("race", "rival")):
            by_actor[event.actor].append(event)
    called: dict[int, Call] = {}
    for number, diary in enumerate(diaries):
        own = by_actor[f"process {number}"]
        told = [(event.action, event.name) for event in own]
        assert told == [(_EVENT_OF[call.kind], call.name) for call in diary.changes], f"process {number}"
        for event, call in zip(own, diary.changes, strict=True):
            if event.action in ("registered", "updated"):
                assert event.detail["revision"] == call.revision, (event, call)
                called[event.id] = call
    return {event.name: called[event.id] for event in events if event.id in called}


def test_a_crowd_loses_nothing_doubles_nothing_and_sees_nothing_stale(grounds: Grounds) -> None:
    check(grounds, gather(grounds, 4))


@pytest.mark.slow
def test_a_crowd_does_so_for_a_minute(grounds: Grounds) -> None:
    check(grounds, gather(grounds, 60))


def test_a_registry_that_all_open_before_it_exists_is_made_once(tmp_path: Path) -> None:
    together = forking().Barrier(_PROCESSES)
    places = [Place(str(tmp_path / f"{number}.db"), tmp_path / "cache", "") for number in range(8)]
    lives = [Life(open_new, places, together) for _ in range(_PROCESSES)]
    assert [life.end() for life in lives] == [0] * _PROCESSES
    assert not [told.error for life in lives for told in life.told]
    for place in places:
        with place.open("judge") as hub:
            assert look(hub, Path(place.database)).problems == []


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["selection", "mixture"])
def test_an_update_while_others_generate_never_mixes_two_revisions(tmp_path: Path, base: Path, strategy: str) -> None:
    with LocalHub() as server:
        grounds = Grounds(tmp_path, base, server)
        for repo_id in ("user/moves", "user/stays"):
            grounds.publish(repo_id)
        with replace(grounds.place, index="exact").open("test") as hub:
            switch(hub, grounds, base, Routing(strategy, k=2))


def switch(hub: LoraHub, grounds: Grounds, base: Path, routing: Routing) -> None:
    """Update back and forth while two threads generate, and compare each answer with the one given in peace."""
    revisions, prompts = grounds.repositories["user/moves"], ["Move it", "Move it on"]
    # Nothing is kept in memory, so that each batch reads files, which a collection may just have removed.
    hub.engine(base)._worker._store = AdapterStore(0, hub._factors_of)

    def answer() -> list[tuple[str, str]]:
        completions = hub.generate(prompts, base_model=base, routing=routing, sampling=Sampling(max_new_tokens=6))
        routes = [{member.adapter.name: member.adapter for member in done.trace.route.members} for done in completions]
        return [(route["user/moves"].revision, done.text) for route, done in zip(routes, completions, strict=True)]

    hub.register("user/moves", revision=revisions[0], samples=prompts)
    hub.register("user/stays", samples=["Move away"])
    alone = answer()
    hub.update("user/moves", revision=revisions[1])
    alone += answer()
    assert len({text for _, text in alone}) == 4
    stop = threading.Event()

    def go_on() -> list[tuple[str, str]]:
        seen = []
        while not stop.is_set():
            seen += answer()
        return seen

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(go_on) for _ in range(2)]
        try:
            for count in range(24):
                hub.update("user/moves", revision=revisions[count % 2])
                if count % 3 == 0:
                    hub.gc()
        finally:
            stop.set()
        answers = Counter(pair for done in running for pair in done.result())
    assert set(answers) == set(alone), (answers, alone)
