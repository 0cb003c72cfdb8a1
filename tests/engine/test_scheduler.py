"""The scheduler: who joins, in what order, within which limits, and how a row that breaks passes is found."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_hub_sdk.engine.scheduler import EngineLimits, Entry, Scheduler
from lora_hub_sdk.errors import ConfigurationError


def entry(
    id: int,  # noqa: A002
    client: str = "a",
    *,
    width: int = 10,
    prompt: int = 1,
    ranks: int = 0,
    arrived: float = 0.0,
    deadline: float | None = None,
) -> Entry:
    return Entry(id, client, width, prompt, ranks, arrived, deadline)


def scheduler(*entries: Entry, **limits: Any) -> Scheduler:
    """One that holds these entries, all ready, and waits for no company."""
    made = Scheduler(EngineLimits(**{"gather_s": 0.0, **limits}))
    for each in entries:
        assert made.offer(each, ready=True)
    return made


# -- order and fairness


def test_clients_take_turns_and_each_is_served_in_the_order_it_came() -> None:
    waiting = scheduler(*[entry(n, "a") for n in range(4)], entry(4, "b"), entry(5, "b"), entry(6, "c"))
    assert waiting.admit(0) == (0, 4, 6, 1, 5, 2, 3)


def test_turns_go_on_where_the_last_batch_left_them() -> None:
    waiting = scheduler(*[entry(n, "a") for n in range(4)], *[entry(n, "b") for n in range(4, 8)], max_rows=1)
    order = []
    for _ in range(8):
        (joined,) = waiting.admit(0)
        order.append(joined)
        waiting.finished(joined)
    assert order == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_call_of_a_thousand_prompts_holds_up_a_single_one_by_one_batch_at_most() -> None:
    waiting = scheduler(*[entry(n, "many") for n in range(1000)], max_rows=8)
    first = waiting.admit(0)
    waiting.offer(entry(1000, "one"), ready=True)
    waiting.finished(first[0])
    waiting.finished(first[1])
    assert 1000 in waiting.admit(0)


def test_an_entry_that_is_not_ready_is_passed_over_and_keeps_its_place() -> None:
    waiting = scheduler(max_rows=1)
    for each, is_ready in [(entry(0), False), (entry(1), True), (entry(2), True)]:
        waiting.offer(each, ready=is_ready)
    assert waiting.admit(0) == (1,)
    waiting.ready(0)
    waiting.finished(1)
    assert waiting.admit(0) == (0,)
    assert waiting.waiting == 1


def test_nothing_joins_before_its_adapters_are_there() -> None:
    waiting = scheduler()
    waiting.offer(entry(0), ready=False)
    assert waiting.admit(0) == ()
    assert waiting.wake_at(0) is None


# -- room


@pytest.mark.parametrize(
    ("entries", "limits", "joined"),
    [
        pytest.param([entry(n) for n in range(5)], {"max_rows": 3}, (0, 1, 2), id="no more rows than allowed"),
        pytest.param([entry(n) for n in range(5)], {"max_tokens": 45}, (0, 1, 2, 3), id="the rectangle is within"),
        pytest.param(
            [entry(0, width=10), entry(1, "b", width=20), entry(2, "c", width=10)],
            {"max_tokens": 39},
            (0, 2),
            id="a wide row counts for every row beside it, and a narrow one joins instead",
        ),
        pytest.param([entry(0, width=99), entry(1)], {"max_tokens": 50}, (0,), id="a row above the limit runs alone"),
        pytest.param([entry(n, ranks=16) for n in range(4)], {"max_ranks": 40}, (0, 1), id="the ranks are within"),
        pytest.param([entry(0, ranks=99), entry(1)], {"max_ranks": 40}, (0,), id="a row of too many ranks runs alone"),
        pytest.param([entry(n, prompt=6) for n in range(4)], {"prefill_tokens": 20}, (0, 1, 2), id="one go of prompts"),
        pytest.param(
            [entry(0, prompt=30), entry(1), entry(2)], {"prefill_tokens": 20}, (0,), id="a long prompt joins by itself"
        ),
        pytest.param(
            [entry(0), entry(1, prompt=30), entry(2)], {"prefill_tokens": 20}, (0,), id="and is not overtaken by others"
        ),
        pytest.param(
            [entry(0, width=10), entry(1, width=90), entry(2, width=10)],
            {"max_tokens": 100},
            (0,),
            id="within a client nobody overtakes one that finds no room",
        ),
    ],
)
def test_one_batch_holds_what_fits(entries: list[Entry], limits: dict[str, Any], joined: tuple[int, ...]) -> None:
    assert scheduler(*entries, **limits).admit(0) == joined


def test_prompts_that_one_go_cannot_take_join_in_the_next() -> None:
    waiting = scheduler(*[entry(n, prompt=10) for n in range(4)], prefill_tokens=20)
    assert waiting.admit(0) == (0, 1)
    assert waiting.wake_at(5) == 5
    assert waiting.admit(5) == (2, 3)
    assert waiting.wake_at(6) is None


def test_a_row_that_ends_makes_room() -> None:
    waiting = scheduler(*[entry(n) for n in range(5)], max_rows=2)
    assert waiting.admit(0) == (0, 1)
    assert waiting.admit(0) == ()
    waiting.finished(0)
    assert waiting.admit(0) == (2,)
    assert (waiting.waiting, waiting.running) == (2, 2)


def test_after_sixty_four_others_a_wide_row_is_next() -> None:
    waiting = scheduler(entry(0, "small"), max_rows=2, max_tokens=100)
    assert waiting.admit(0) == (0,)
    waiting.offer(entry(1, "wide", width=60), ready=True)
    running, overtaken = 0, 0
    for n in range(2, 200):
        waiting.offer(entry(n, "small"), ready=True)
        joined = waiting.admit(0)
        if not joined:
            break
        overtaken += 1
        assert joined == (n,)
        waiting.finished(running)
        running = n
    assert overtaken == 64
    waiting.finished(running)
    assert waiting.admit(0) == (1,)


def test_a_wide_row_that_is_withdrawn_holds_up_nobody() -> None:
    waiting = scheduler(entry(0, "small", width=50), max_tokens=100)
    waiting.admit(0)
    waiting.offer(entry(1, "wide", width=99), ready=True)
    waiting.offer(entry(2, "wide"), ready=True)
    assert waiting.admit(0) == ()
    assert waiting.withdraw(1)
    assert waiting.admit(0) == (2,)


def test_a_thousand_clients_with_wide_rows_are_all_served() -> None:
    waiting = scheduler(*[entry(n, f"client {n}", width=60) for n in range(1000)], max_rows=3, max_tokens=100)
    served: list[int] = []
    while joined := waiting.admit(0):
        assert len(joined) == 1
        served += joined
        waiting.finished(joined[0])
    assert served == list(range(1000))


# -- taking and giving back


def test_a_full_queue_takes_nothing() -> None:
    waiting = scheduler(entry(0), entry(1), max_waiting=2)
    assert not waiting.offer(entry(2), ready=True)
    assert waiting.waiting == 2
    waiting.admit(0)
    assert waiting.offer(entry(2), ready=True)


def test_an_id_that_is_in_use_is_refused() -> None:
    waiting = scheduler(entry(0))
    with pytest.raises(ConfigurationError, match="offered twice"):
        waiting.offer(entry(0), ready=True)


@pytest.mark.parametrize("before", ["offered", "ready", "running", "failed"])
def test_a_withdrawn_entry_is_gone_wherever_it_was(before: str) -> None:
    waiting = scheduler()
    waiting.offer(entry(0, deadline=5.0), ready=before != "offered")
    waiting.offer(entry(1, "b"), ready=True)
    if before in ("running", "failed"):
        assert waiting.admit(0) == (0, 1)
    if before == "failed":
        waiting.failed([0, 1])
    assert waiting.withdraw(0)
    assert not waiting.withdraw(0)
    waiting.ready(0)
    waiting.finished(0)
    assert waiting.failed([0]) == ()
    assert waiting.expired(9) == ()
    assert waiting.waiting + waiting.running == 1
    assert 0 not in waiting.admit(9)


def test_what_reaches_its_deadline_is_taken_out_waiting_or_running() -> None:
    waiting = scheduler(entry(0, deadline=3.0), entry(1), entry(2, deadline=2.0), max_rows=2)
    assert waiting.admit(0) == (0, 1)
    assert waiting.wake_at(0) == 2.0
    assert waiting.expired(1.9) == ()
    assert waiting.expired(3.0) == (2, 0)
    assert waiting.expired(3.0) == ()
    assert (waiting.waiting, waiting.running) == (0, 1)
    assert waiting.wake_at(3.0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        *[{name: 0} for name in ("max_rows", "max_tokens", "max_waiting", "prefill_tokens", "max_ranks")],
        *[{"gather_s": seconds} for seconds in (-1.0, math.inf, math.nan)],
    ],
)
def test_limits_that_let_nothing_run_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        EngineLimits(**wrong)


# -- gathering


def test_an_idle_engine_waits_a_moment_for_company() -> None:
    waiting = Scheduler(EngineLimits(gather_s=2.0))
    waiting.offer(entry(0, arrived=10.0), ready=True)
    assert waiting.admit(10.0) == ()
    assert waiting.wake_at(10.0) == 12.0
    waiting.offer(entry(1, "b", arrived=11.5), ready=True)
    assert waiting.admit(11.5) == ()
    assert waiting.wake_at(11.5) == 12.0
    assert waiting.admit(12.0) == (0, 1)


def test_an_idle_engine_does_not_wait_for_company_that_it_could_not_take() -> None:
    waiting = Scheduler(EngineLimits(gather_s=2.0, max_rows=2))
    waiting.offer(entry(0, arrived=10.0), ready=True)
    waiting.offer(entry(1, arrived=10.0), ready=True)
    assert waiting.wake_at(10.0) == 10.0
    assert waiting.admit(10.0) == (0, 1)


def test_entries_that_still_load_are_no_company() -> None:
    waiting = Scheduler(EngineLimits(gather_s=2.0, max_rows=2))
    waiting.offer(entry(0, arrived=8.5), ready=False)
    waiting.offer(entry(1, arrived=10.0), ready=True)
    assert waiting.admit(10.0) == ()
    assert waiting.wake_at(10.0) == 12.0


def test_a_busy_engine_waits_for_nobody() -> None:
    waiting = Scheduler(EngineLimits(gather_s=2.0))
    waiting.offer(entry(0, arrived=0.0), ready=True)
    assert waiting.admit(2.0) == (0,)
    waiting.offer(entry(1, arrived=3.0), ready=True)
    assert waiting.admit(3.0) == (1,)


# -- failed passes


def test_rows_of_a_failed_pass_come_first_again_and_in_halves() -> None:
    waiting = scheduler(*[entry(n) for n in range(12)], max_rows=8)
    assert waiting.admit(0) == tuple(range(8))
    assert waiting.failed(range(8)) == ()
    assert waiting.admit(0) == (0, 1, 2, 3)
    assert waiting.admit(0) == ()
    waiting.finished(0)
    assert waiting.admit(0) == (4,)
    for n in range(1, 8):
        waiting.finished(n)
        waiting.admit(0)
    assert waiting.running == 4


def test_a_row_that_joins_capped_ones_obeys_their_cap() -> None:
    waiting = scheduler(*[entry(n) for n in range(4)])
    waiting.failed(waiting.admit(0))
    assert waiting.admit(0) == (0, 1)
    waiting.finished(1)
    assert waiting.admit(0) == (2,)
    waiting.finished(2)
    assert waiting.admit(0) == (3,)
    waiting.offer(entry(4), ready=True)
    assert waiting.admit(0) == ()
    waiting.finished(0)
    assert waiting.admit(0) == (4,)
    waiting.offer(entry(5), ready=True)
    assert waiting.admit(0) == ()
    waiting.finished(3)
    assert waiting.admit(0) == (5,)


def test_a_joiner_whose_pass_failed_beside_running_rows_is_tried_alone_before_it_is_given_up() -> None:
    waiting = scheduler(entry(0), entry(1))
    waiting.admit(0)
    waiting.offer(entry(2), ready=True)
    assert waiting.admit(0) == (2,)
    assert waiting.failed([2]) == ()
    assert waiting.admit(0) == ()
    waiting.finished(0)
    waiting.finished(1)
    assert waiting.admit(0) == (2,)
    assert waiting.failed([2]) == (2,)
    assert (waiting.waiting, waiting.running) == (0, 0)


def test_retries_wait_for_no_company() -> None:
    waiting = scheduler(entry(0), entry(1))
    waiting.failed(waiting.admit(0))
    assert waiting.wake_at(7) == 7
    assert waiting.admit(7) == (0,)


@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 40), late=st.integers(0, 20))
def test_a_bad_row_is_found_by_bisection_and_no_other_is_failed(data: st.DataObject, rows: int, late: int) -> None:
    waiting = scheduler(*[entry(n) for n in range(rows)], max_rows=rows)
    bad = data.draw(st.integers(0, rows - 1), label="bad")
    joiners_alone = data.draw(st.booleans(), label="only those that join are in the pass")
    done: list[int] = []
    failed: list[int] = []
    running: list[int] = []
    rounds, offered = 0, rows
    while waiting.waiting + waiting.running:
        joined = list(waiting.admit(0))
        running += joined
        in_pass = joined if joined and joiners_alone else running
        if offered < rows + late:
            assert waiting.offer(entry(offered, "b"), ready=True)
            offered += 1
        if bad in in_pass:
            rounds += 1
            failed += waiting.failed(in_pass)
            running = [n for n in running if n not in in_pass]
        elif running:
            ended = running.pop(data.draw(st.integers(0, len(running) - 1)))
            waiting.finished(ended)
            done.append(ended)
    assert failed == [bad]
    assert sorted(done) == [n for n in range(offered) if n != bad]
    assert rounds <= math.floor(math.log2(rows)) + 1


# -- everything at once


class Machine(RuleBasedStateMachine):
    """Any calls in any order, beside plain lists that know who waits and who runs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ids = 0
        self.waiting: list[Entry] = []  # in the order of the offers
        self.again: list[Entry] = []  # those of the waiting ones that have joined before
        self.joined: dict[int, int] = {}  # when they did, counted
        self.running: list[Entry] = []
        self.loaded: set[int] = set()
        self.caps: dict[int, int] = {}
        self.since: dict[str, Counter[str]] = {}  # others that joined since a client joined or began to wait

    @initialize(
        rows=st.integers(1, 6),
        tokens=st.integers(10, 60),
        ranks=st.integers(4, 20),
        queue=st.integers(3, 20),
        prefill=st.integers(3, 30),
        gather=st.sampled_from([0.0, 0.0, 3.0]),
    )
    def begin(self, rows: int, tokens: int, ranks: int, queue: int, prefill: int, gather: float) -> None:
        self.limits = EngineLimits(rows, tokens, queue, prefill, gather, ranks)
        self.scheduler = Scheduler(self.limits)

    # what happens

    @rule(
        client=st.sampled_from("abc"),
        prompt=st.integers(1, 20),
        new=st.integers(1, 20),
        ranks=st.integers(0, 8),
        ready=st.booleans(),
        life=st.none() | st.integers(0, 12),
    )
    def offer(self, client: str, prompt: int, new: int, ranks: int, ready: bool, life: int | None) -> None:
        self.ids += 1
        deadline = None if life is None else self.now + life
        offered = Entry(self.ids, client, prompt + new, prompt, ranks, self.now, deadline)
        taken = self.scheduler.offer(offered, ready=ready)
        assert taken == (len(self.waiting) < self.limits.max_waiting)
        if taken:
            self.waiting.append(offered)
            self.caps[offered.id] = self.limits.max_rows
            if ready:
                self.load(offered)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self.scheduler.ready(one.id)
        if one.id not in self.loaded:
            self.load(one)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting + self.running))
        assert self.scheduler.withdraw(one.id)
        self.drop(one.id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.running))
        self.scheduler.finished(one.id)
        self.drop(one.id)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), everybody=st.booleans())
    def fail(self, data: st.DataObject, everybody: bool) -> None:
        ids = [one.id for one in self.running]
        if not everybody:
            ids = data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
        alone = len(ids) == len(self.running) == 1
        assert self.scheduler.failed(ids) == (tuple(ids) if alone else ())
        if alone:
            self.drop(ids[0])
            return
        back = [one for one in self.running if one.id in ids]
        self.running = [one for one in self.running if one.id not in ids]
        self.waiting += back
        self.again += back
        for one in back:
            self.caps[one.id] = min(self.caps[one.id], max(1, len(ids) // 2))

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        late = [one.id for one in self.waiting + self.running if one.deadline is not None and one.deadline <= self.now]
        assert sorted(self.scheduler.expired(self.now)) == sorted(late)
        for one in late:
            self.drop(one)

    @rule()
    def admit(self) -> None:
        gathering = self.gathers()
        joined = self.scheduler.admit(self.now)
        assert not (gathering and joined)
        prompts = 0
        for id in joined:  # noqa: A001
            (one,) = [one for one in self.waiting if one.id == id]
            self.check_turn(one)
            prompts += one.prompt_tokens
            self.waiting.remove(one)
            self.running.append(one)
            if one in self.again:
                self.again.remove(one)
            else:
                self.count(one)
        assert prompts <= self.limits.prefill_tokens or len(joined) == 1
        if not gathering:
            left = self.could_join()
            assert joined or not left
            assert not left or any(one.prompt_tokens + prompts > self.limits.prefill_tokens for one in left)

    # what always holds

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.scheduler.waiting == len(self.waiting)
        assert self.scheduler.running == len(self.running)

    @invariant()
    def the_running_rows_are_within_the_limits(self) -> None:
        rows = len(self.running)
        if rows > 1:
            assert rows <= min(self.caps[one.id] for one in self.running)
            assert rows * max(one.width for one in self.running) <= self.limits.max_tokens
            assert sum(one.ranks for one in self.running) <= self.limits.max_ranks

    @invariant()
    def it_wakes_in_time(self) -> None:
        wake = self.scheduler.wake_at(self.now)
        deadlines = [one.deadline for one in self.waiting + self.running if one.deadline is not None]
        if deadlines:
            assert wake is not None
            assert wake <= max(self.now, min(deadlines))
        if self.could_join():
            assert wake is not None
            assert wake >= self.now
            if self.gathers():
                assert wake <= min(one.arrived for one in self.ready_ones()) + self.limits.gather_s
            else:
                assert wake == self.now
        if (wake is None or wake > self.now) and not self.gathers():
            assert self.scheduler.admit(self.now) == ()

    def teardown(self) -> None:
        """In the end everybody is served."""
        if not hasattr(self, "scheduler"):
            return
        for one in self.waiting:
            self.scheduler.ready(one.id)
        left = {one.id for one in self.waiting}
        self.now += self.limits.gather_s
        while left or self.running:
            joined = self.scheduler.admit(self.now)
            assert joined or self.running
            left -= set(joined)
            for id in [*joined, *(one.id for one in self.running)]:  # noqa: A001
                self.scheduler.finished(id)
            self.running = []
        assert self.scheduler.waiting + self.scheduler.running == 0
        assert self.scheduler.expired(math.inf) == ()

    # the lists beside it

    def load(self, one: Entry) -> None:
        if not any(other.client == one.client for other in self.ready_ones()):
            self.since[one.client] = Counter()
        self.loaded.add(one.id)

    def drop(self, id: int) -> None:  # noqa: A002
        self.waiting = [one for one in self.waiting if one.id != id]
        self.running = [one for one in self.running if one.id != id]
        self.again = [one for one in self.again if one.id != id]

    def ready_ones(self) -> list[Entry]:
        """Those that never joined and could, in the order of the offers."""
        return [one for one in self.waiting if one.id in self.loaded and one not in self.again]

    def heads(self) -> list[Entry]:
        """The next of each client."""
        return list({one.client: one for one in reversed(self.ready_ones())}.values())

    def gathers(self) -> bool:
        ready = self.ready_ones()
        return bool(
            ready
            and not self.running
            and not self.again
            and len(ready) < self.limits.max_rows
            and min(one.arrived for one in ready) + self.limits.gather_s > self.now
        )

    def fits(self, one: Entry) -> bool:
        rows = [*self.running, one]
        return len(rows) == 1 or (
            len(rows) <= min(self.caps[row.id] for row in rows)
            and len(rows) * max(row.width for row in rows) <= self.limits.max_tokens
            and sum(row.ranks for row in rows) <= self.limits.max_ranks
        )

    def could_join(self) -> list[Entry]:
        """Whoever may come next: the first of those that failed before anybody else."""
        next_ones = [min(self.again, key=lambda one: self.joined[one.id])] if self.again else self.heads()
        return [one for one in next_ones if self.fits(one)]

    def check_turn(self, one: Entry) -> None:
        assert one in self.could_join(), "the first goes first, within a client and among those that failed"
        if self.again:
            return
        for other in self.heads():
            if other.client != one.client and self.since[other.client][one.client]:
                assert not self.fits(other), "a client had two turns while another one waited that fits"

    def count(self, one: Entry) -> None:
        for client, others in self.since.items():
            if client != one.client:
                others[one.client] += 1
        self.since[one.client] = Counter()
        self.joined[one.id] = len(self.joined)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
