"""The routing desk over a real registry: what is gathered, whose fault an error is, and how callers leave."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_hub_sdk.composition.desk import RoutingDesk
from lora_hub_sdk.composition.router import Router
from lora_hub_sdk.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EmptyPromptError,
    EngineClosedError,
    EngineCrashedError,
    NoAdaptersError,
    UnknownStrategyError,
)
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.retriever import Retriever
from lora_hub_sdk.types import Route, Routing
from tests.encoders import Hashing
from tests.registry.entries import entry

NAMES = ("french", "maths", "poems")
NEAREST = Routing("selection")


class UnreadableError(Exception):
    """What an encoder raises that cannot read a text."""


class Gate:
    """Holds the encoder up in its first call, and knows what it was given in each; some texts it cannot read."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.batches: list[list[str]] = []
        self.unreadable: dict[str, BaseException] = {}

    def __call__(self, texts: Sequence[str]) -> None:
        self.batches.append(list(texts))
        self.reached.set()
        assert self.open.wait(60)
        for text in texts:
            if text in self.unreadable:
                raise self.unreadable[text]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def router(tmp_path: Path, gate: Gate) -> Iterator[Router]:
    encoder = Hashing("one", gate)
    vectors = Hashing("one").encode(NAMES)  # the text that is an adapter's name is nearest to it
    registry = Registry(str(tmp_path / "hub.db"), index="exact", encoder=lambda: encoder.fingerprint, actor="test")
    for name, vector in zip(NAMES, vectors, strict=True):
        registry.add(entry(name, vector, encoder=encoder.fingerprint))
    yield Router(registry, Retriever(registry, lambda: encoder, rerank=False))
    registry.close()


@pytest.fixture
def desk(router: Router, gate: Gate) -> Iterator[RoutingDesk]:
    opened = RoutingDesk(_by(router))
    yield opened
    gate.open.set()
    opened.close()


def _by(router: Router) -> Callable[[Sequence[str], str | os.PathLike[str] | None, Routing], list[Route]]:
    return lambda prompts, base, routing: router.route(prompts, None if base is None else os.fspath(base), routing)


def _held_up(desk: RoutingDesk, gate: Gate) -> Future[list[Route]]:
    """A call that is being routed until the gate opens."""
    first = desk.submit(["first"], "base", NEAREST)
    assert gate.reached.wait(60)
    return first


def _names(routes: Sequence[Route]) -> list[list[str]]:
    return [[member.adapter.name for member in route.members] for route in routes]


def _facts(route: Route) -> object:
    return route.strategy, route.averaged, [(member.adapter, member.score is None) for member in route.members]


def test_what_comes_while_one_call_is_routed_is_routed_together(desk: RoutingDesk, gate: Gate) -> None:
    first = _held_up(desk, gate)
    calls = [desk.submit([NAMES[place % 3]], "base", NEAREST) for place in range(12)]
    pair = desk.submit(["poems", "maths"], "base", NEAREST)
    gate.open.set()
    assert _names(first.result(60)) != []
    assert [_names(call.result(60)) for call in calls] == [[[NAMES[place % 3]]] for place in range(12)]
    assert _names(pair.result(60)) == [["poems"], ["maths"]]
    assert [len(batch) for batch in gate.batches] == [1, 14]


def test_callers_get_what_the_router_would_have_told_them_alone(desk: RoutingDesk, gate: Gate, router: Router) -> None:
    gate.open.set()
    routings = [NEAREST, Routing(k=2), Routing("fusion", k=3, weights="similarity"), Routing("base"), Routing("base")]
    routings += [Routing(adapters=("maths",)), Routing(exclude=("maths",)), Routing(min_score=0.9)]
    asked = [([f"{name} {number}" for name in NAMES[: 1 + number % 3]], routings[number % 8]) for number in range(64)]
    with ThreadPoolExecutor(16) as callers:
        found = list(callers.map(lambda call: desk.route(call[0], "base", call[1]), asked))
    for routes, (prompts, routing) in zip(found, asked, strict=True):
        for route, alone in zip(routes, router.route(prompts, "base", routing), strict=True):
            assert _facts(route) == _facts(alone)
            # The last bit of a cosine depends on how many were taken at a time.
            weights = [[member.weight for member in of.members] for of in (route, alone)]
            assert weights[0] == pytest.approx(weights[1], abs=1e-6)
            scores = [[member.score or 0.0 for member in of.members] for of in (route, alone)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_calls_that_are_routed_otherwise_are_kept_apart(desk: RoutingDesk, gate: Gate) -> None:
    _held_up(desk, gate)
    listed = [desk.submit(["maths"], "base", Routing("selection", exclude=["maths"])) for _ in range(2)]  # type: ignore[arg-type]
    plain = desk.submit(["maths"], "base", NEAREST)
    elsewhere = desk.submit(["maths"], "other", NEAREST)
    gate.open.set()
    assert _names(plain.result(60)) == [["maths"]]
    assert all(_names(call.result(60)) != [["maths"]] for call in listed)
    with pytest.raises(NoAdaptersError, match="other"):
        elsewhere.result(60)
    assert [len(batch) for batch in gate.batches] == [1, 2, 1, 1]


def test_a_full_group_does_not_wait_for_the_next(desk: RoutingDesk, gate: Gate) -> None:
    _held_up(desk, gate)
    calls = [desk.submit(["maths", "poems"], "base", NEAREST) for _ in range(40)]
    gate.open.set()
    for call in calls:
        assert _names(call.result(60)) == [["maths"], ["poems"]]
    assert [len(batch) for batch in gate.batches] == [1, 64, 16]


def test_no_routing_waits_for_all_the_calls_of_another(desk: RoutingDesk, gate: Gate) -> None:
    _held_up(desk, gate)
    many = [desk.submit(["maths", "poems"], "base", NEAREST) for _ in range(70)]
    other = desk.submit(["maths"], "base", Routing(k=2))
    gate.open.set()
    assert len(_names(other.result(60))[0]) == 2
    for call in many:
        call.result(60)
    assert [len(batch) for batch in gate.batches] == [1, 64, 1, 64, 12]


def test_routes_that_need_no_search_do_not_wait_for_those_that_do(desk: RoutingDesk, gate: Gate) -> None:
    first = _held_up(desk, gate)
    assert _names(desk.route(["x", "y"], "base", Routing(adapters=("maths", "poems")))) == [["maths", "poems"]] * 2
    assert _names(desk.route(["x"], "base", Routing("base"))) == [[]]
    assert not first.done()


def test_a_large_call_holds_up_no_small_one(router: Router) -> None:
    released, routed = threading.Event(), _by(router)

    def slow_for_many(prompts: Sequence[str], base: str | os.PathLike[str] | None, routing: Routing) -> list[Route]:
        assert len(prompts) < 100 or released.wait(60)
        return routed(prompts, base, Routing("base"))

    desk = RoutingDesk(slow_for_many)
    large = desk.submit(["maths"] * 100, "base", NEAREST)
    assert len(desk.route(["maths"], "base", NEAREST)) == 1
    assert not large.done()
    released.set()
    assert len(large.result(60)) == 100
    desk.close()


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_call_that_makes_no_sense_is_refused_at_once_and_names_its_own_row(desk: RoutingDesk, gate: Gate) -> None:
    first = _held_up(desk, gate)
    with pytest.raises(EmptyPromptError) as refused:
        desk.submit(["a", "b", " "], "base", NEAREST)
    assert refused.value.row == 2
    with pytest.raises(UnknownStrategyError):
        desk.submit(["a"], "base", Routing("soup"))
    gate.open.set()
    assert len(first.result(60)) == 1


def test_one_unreadable_prompt_fails_its_own_caller_only(desk: RoutingDesk, gate: Gate) -> None:
    gate.unreadable["bad"] = UnreadableError("bad")
    _held_up(desk, gate)
    before, pair = desk.submit(["french"], "base", NEAREST), desk.submit(["maths", "poems"], "base", NEAREST)
    bad, after = desk.submit(["maths", "bad"], "base", NEAREST), desk.submit(["poems"], "base", NEAREST)
    gate.open.set()
    with pytest.raises(UnreadableError) as raised:
        bad.result(60)
    assert raised.value.__context__ is None, "nothing of the others' calls hangs on it"
    assert _names(before.result(60)) + _names(pair.result(60)) == [["french"], ["maths"], ["poems"]]
    assert _names(after.result(60)) == [["poems"]]


def test_what_the_registry_refuses_is_asked_once_and_told_to_each_caller(desk: RoutingDesk, gate: Gate) -> None:
    _held_up(desk, gate)
    calls = [desk.submit([f"prompt {number}"], "unknown", NEAREST) for number in range(5)]
    gate.open.set()
    told = [call.exception(60) for call in calls]
    assert all(isinstance(error, NoAdaptersError) and "'unknown'" in str(error) for error in told)
    assert len({id(error) for error in told}) == 5, "raising writes into an error, so nobody shares one"
    assert [len(batch) for batch in gate.batches] == [1, 5]


def test_an_error_keeps_its_facts_when_it_is_told_to_many(desk: RoutingDesk) -> None:
    with ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(desk.route, ["x"], "base", Routing(adapters=("math",))) for _ in range(8)]
    for call in calls:
        error = call.exception()
        assert isinstance(error, AdapterNotFoundError)
        assert (error.name, error.similar) == ("math", ("maths",))
        assert "did you mean 'maths'" in str(error)


def test_a_thread_that_is_told_to_exit_leaves_nobody_hanging(desk: RoutingDesk, gate: Gate) -> None:
    gate.unreadable["bad"] = SystemExit(3)
    first = _held_up(desk, gate)
    bad, other = desk.submit(["bad"], "base", NEAREST), desk.submit(["maths"], "base", Routing(k=2))
    gate.open.set()
    assert len(first.result(60)) == 1
    for call in (bad, other):
        error = call.exception(60)
        assert isinstance(error, EngineCrashedError)
        assert isinstance(error.__cause__, SystemExit)
    assert _names(desk.route(["maths"], "base", NEAREST)) == [["maths"]], "it goes on"


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_a_call_that_was_taken_back_is_not_routed(desk: RoutingDesk, gate: Gate) -> None:
    _held_up(desk, gate)
    gone, stays = desk.submit(["french"], "base", NEAREST), desk.submit(["maths"], "base", NEAREST)
    alone = desk.submit(["poems"], "base", Routing(k=2))
    assert gone.cancel()
    assert alone.cancel()
    gate.open.set()
    assert _names(stays.result(60)) == [["maths"]]
    with pytest.raises(CancelledError):
        gone.result()
    assert gate.batches == [["first"], ["maths"]]


def test_closing_finishes_what_is_being_routed_and_fails_what_waits(desk: RoutingDesk, gate: Gate) -> None:
    first = _held_up(desk, gate)
    waiting = [desk.submit(["maths"], "base", NEAREST) for _ in range(3)]
    waiting[1].cancel()
    with ThreadPoolExecutor(1) as other:
        closing = other.submit(desk.close)
        for call in (waiting[0], waiting[2]):
            assert isinstance(call.exception(60), EngineClosedError)
        for routing in (NEAREST, Routing("base")):
            with pytest.raises(EngineClosedError):
                desk.route(["maths"], "base", routing)
        gate.open.set()
        closing.result(60)
    assert len(first.result(0)) == 1
    desk.close()


def test_time_runs_out_for_who_gave_a_limit(desk: RoutingDesk, gate: Gate) -> None:
    first = _held_up(desk, gate)
    with pytest.raises(DeadlineExceededError, match=r"0\.01"):
        desk.route(["maths"], "base", NEAREST, timeout_s=0.01)
    with pytest.raises(DeadlineExceededError):
        asyncio.run(desk.aroute(["maths"], "base", NEAREST, timeout_s=0.01))
    gate.open.set()
    assert len(first.result(60)) == 1
    assert _names(desk.route(["poems"], "base", NEAREST, timeout_s=60)) == [["poems"]]
    assert gate.batches == [["first"], ["poems"]], "whoever gave up is not routed any more"


def test_a_timeout_of_the_routing_itself_is_told_as_it_is(desk: RoutingDesk, gate: Gate) -> None:
    gate.open.set()
    gate.unreadable["bad"] = TimeoutError("the index server")
    with pytest.raises(TimeoutError, match="the index server") as raised:
        desk.route(["bad"], "base", NEAREST, timeout_s=60)
    assert not isinstance(raised.value, DeadlineExceededError)
    with pytest.raises(TimeoutError, match="the index server"):
        asyncio.run(desk.aroute(["bad"], "base", NEAREST, timeout_s=60))


class Parts:
    """A router that waits in its first call, and tells how many prompts it was given in each."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, prompts: Sequence[str], _base: object, _routing: object) -> list[Route]:
        self.sizes.append(len(prompts))
        self.reached.set()
        assert self.go_on.wait(60)
        return [Route("base", "outputs")] * len(prompts)


def test_a_call_of_thousands_ends_when_it_is_taken_back() -> None:
    parts = Parts()
    desk = RoutingDesk(parts)
    gone, next_one = (desk.submit(["maths"] * size, "base", NEAREST) for size in (3000, 50))
    assert parts.reached.wait(60)
    assert gone.cancel()
    parts.go_on.set()
    assert len(next_one.result(60)) == 50
    assert parts.sizes == [256, 50]
    desk.close()


def test_a_call_of_thousands_ends_when_the_desk_is_closed() -> None:
    parts = Parts()
    desk = RoutingDesk(parts)
    call = desk.submit(["maths"] * 3000, "base", NEAREST)
    assert parts.reached.wait(60)
    waiting = desk.submit(["maths"] * 50, "base", NEAREST)
    with ThreadPoolExecutor(1) as other:
        closing = other.submit(desk.close)
        assert isinstance(waiting.exception(60), EngineClosedError)
        parts.go_on.set()
        closing.result(60)
    assert isinstance(call.exception(0), EngineClosedError)
    assert parts.sizes == [256]


def test_a_call_of_thousands_gets_all_its_routes(desk: RoutingDesk, gate: Gate) -> None:
    gate.open.set()
    prompts = [NAMES[place % 3] for place in range(1000)]
    assert _names(desk.route(prompts, "base", NEAREST)) == [[name] for name in prompts]
    assert desk.route([], "base", NEAREST) == []


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_the_event_loop_runs_on_while_prompts_are_routed(desk: RoutingDesk, gate: Gate) -> None:
    async def ask() -> list[list[Route]]:
        calls = [asyncio.create_task(desk.aroute([name], "base", NEAREST)) for name in NAMES]
        while not gate.reached.is_set():
            await asyncio.sleep(0)  # would never be set if the loop stood still
        gate.open.set()
        return list(await asyncio.gather(*calls))

    assert [_names(routes) for routes in asyncio.run(ask())] == [[[name]] for name in NAMES]


def test_a_cancelled_task_takes_its_call_back(desk: RoutingDesk, gate: Gate) -> None:
    async def ask() -> None:
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(desk.aroute(["first"], "base", NEAREST))
        assert await loop.run_in_executor(None, gate.reached.wait, 60)
        gone = asyncio.create_task(desk.aroute(["french"], "base", NEAREST))
        stays = asyncio.create_task(desk.aroute(["maths"], "base", NEAREST))
        await asyncio.sleep(0)
        first.cancel()
        gone.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await _ends(first, gone))
        gate.open.set()
        assert _names(await stays) == [["maths"]]

    asyncio.run(ask())
    assert gate.batches == [["first"], ["maths"]]


async def _ends(*tasks: asyncio.Task[list[Route]]) -> list[list[Route] | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_whoever_awaits_is_told_of_an_error_that_asyncio_cannot_carry(desk: RoutingDesk, gate: Gate) -> None:
    gate.open.set()
    gate.unreadable["bad"] = StopIteration()
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(desk.aroute(["bad"], "base", NEAREST), 60))


def test_a_loop_that_ended_before_its_routes_came_disturbs_nobody(desk: RoutingDesk, gate: Gate) -> None:
    async def leave() -> None:
        task = asyncio.create_task(desk.aroute(["french"], "base", NEAREST))
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(leave())
    stays = desk.submit(["maths"], "base", NEAREST)
    gate.open.set()
    assert _names(stays.result(60)) == [["maths"]]


def test_many_threads_come_and_go(desk: RoutingDesk, gate: Gate) -> None:
    gate.open.set()
    gate.unreadable["bad"] = UnreadableError("bad")

    def ask(number: int) -> list[list[str]] | None:
        time.sleep(number % 7 / 1000)
        future = desk.submit(["bad" if number % 5 == 0 else NAMES[number % 3]], "base", NEAREST)
        if number % 11 == 0 and future.cancel():
            return None
        return None if isinstance(future.exception(60), UnreadableError) else _names(future.result())

    with ThreadPoolExecutor(32) as callers:
        found = list(callers.map(ask, range(400)))
    for number, names in enumerate(found):
        assert names == (None if number % 5 == 0 else [[NAMES[number % 3]]]) or (number % 11 == 0 and names is None)
