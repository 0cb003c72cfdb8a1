"""Taking turns: whatever is compared runs once in each round, so that the machine's other users slow all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from lora_hub_sdk.models.openmp import give_threads_back


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, in which no threads of an earlier one wait for work."""
    give_threads_back()
    start = perf_counter()
    call()
    return perf_counter() - start


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each call by rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + warm_up):
        for name, call in calls.items():
            taken = timed(call)
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds
