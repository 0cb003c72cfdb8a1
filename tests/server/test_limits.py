from __future__ import annotations

import threading
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub_sdk.errors import ConfigurationError, TooManyRequestsError
from lora_hub_sdk.server.limits import Pass, Turnstile


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(turnstile: Turnstile, caller: str = "ann") -> int:
    """The seconds that a refused caller is told."""
    with pytest.raises(TooManyRequestsError) as error:
        turnstile.enter(caller)
    assert f"try again in {error.value.retry_after_s} s" in str(error.value)
    return error.value.retry_after_s


def test_a_minutes_share_can_be_used_at_once_and_comes_back_evenly() -> None:
    clock = Clock()
    gate = Turnstile(requests_per_minute=6, clock=clock)
    for _ in range(6):
        gate.enter("ann").leave()
    assert refused(gate) == 10
    clock.now += 4
    assert refused(gate) == 6
    clock.now += 6
    gate.enter("ann").leave()
    assert refused(gate) == 10
    clock.now += 3600
    for _ in range(6):
        gate.enter("ann").leave()
    assert refused(gate) == 10


def test_each_caller_has_a_share_of_its_own() -> None:
    gate = Turnstile(requests_per_minute=1, concurrent=1, clock=Clock())
    for caller in ("ann", "ben", "cat"):
        with gate.enter(caller):
            assert refused(gate, caller) >= 1
        assert refused(gate, caller) == 60


def test_only_so_many_run_at_one_time() -> None:
    gate = Turnstile(concurrent=2, clock=Clock())
    first, second = gate.enter("ann"), gate.enter("ann")
    assert refused(gate) == 1
    first.leave()
    third = gate.enter("ann")
    assert gate.running("ann") == 2
    assert refused(gate) == 1
    for one in (second, third):
        one.leave()
    assert gate.running("ann") == 0


def test_a_pass_counts_once_however_often_it_is_given_back() -> None:
    gate = Turnstile(concurrent=2, clock=Clock())
    kept = gate.enter("ann")
    with gate.enter("ann") as other:
        other.leave()
    other.leave()
    assert gate.running("ann") == 1
    with pytest.raises(ZeroDivisionError), gate.enter("ann"):
        1 / 0  # noqa: B018
    assert gate.running("ann") == 1
    kept.leave()
    assert gate.running("ann") == 0


def test_what_was_refused_takes_nothing_from_the_share() -> None:
    clock = Clock()
    gate = Turnstile(requests_per_minute=2, concurrent=1, clock=clock)
    running = gate.enter("ann")
    for _ in range(5):
        refused(gate)
    running.leave()
    gate.enter("ann").leave()
    for _ in range(5):
        assert refused(gate) == 30
    clock.now += 30
    gate.enter("ann").leave()


def test_without_limits_everything_passes() -> None:
    gate = Turnstile(clock=Clock())
    passes = [gate.enter("ann") for _ in range(1000)]
    assert gate.running("ann") == 1000
    for one in passes:
        one.leave()
    assert gate.running("ann") == gate.running("nobody") == 0


def test_memory_is_bounded_and_nobody_who_runs_is_forgotten() -> None:
    gate = Turnstile(requests_per_minute=1, concurrent=1, most_callers=10, clock=Clock())
    running = gate.enter("runs")
    for number in range(1000):
        gate.enter(f"caller {number}").leave()
    assert len(gate._shares) == 10
    assert refused(gate, "runs") == 1
    assert refused(gate, "caller 999") == 60
    gate.enter("caller 0").leave()  # forgotten long ago
    running.leave()


@pytest.mark.parametrize("name", ["requests_per_minute", "concurrent", "most_callers"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=0"):
        Turnstile(**{name: 0})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(per_minute=st.integers(1, 120), waits=st.lists(st.floats(0, 30), min_size=1, max_size=80))
def test_no_span_of_time_holds_more_than_its_share(per_minute: int, waits: list[float]) -> None:
    clock = Clock()
    gate = Turnstile(requests_per_minute=per_minute, clock=clock)
    entered: deque[float] = deque()
    for wait in waits:
        clock.now += wait
        try:
            gate.enter("ann").leave()
        except TooManyRequestsError as error:
            clock.now += error.retry_after_s  # the time that is told is enough
            gate.enter("ann").leave()
        entered.append(clock.now)
    for start in range(len(entered)):
        for end in range(start, len(entered)):
            assert end - start + 1 <= per_minute * (1 + (entered[end] - entered[start]) / 60) + 1e-6


def test_threads_that_enter_at_once_are_counted_each() -> None:
    gate = Turnstile(requests_per_minute=100, concurrent=40, clock=Clock())
    passes: deque[Pass] = deque()

    def many() -> None:
        for _ in range(20):
            try:
                passes.append(gate.enter("ann"))
            except TooManyRequestsError:
                continue

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passes) == gate.running("ann") == 40
