"""What an engine holds after thousands of requests and hundreds of adapters is what it held after the first few."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.errors import GenerationError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.types import Adapter
from tests.engine.crowd import (
    PATIENCE_S,
    RANK_BYTES,
    adapters_in,
    assert_nothing_is_left,
    cuda_or_skip,
    random_request,
    wait_for,
)

HOST_BYTES = 60_000
DEVICE_BYTES = 100 * RANK_BYTES


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def loaded(base: Path, request: pytest.FixtureRequest) -> BaseModel:
    device = cuda_or_skip(request.param)
    return load_base_model(resolve_model(base), ModelSettings(dtype="float32", device=device))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return adapters_in(tmp_path_factory.mktemp("adapters"), base, 60)


@pytest.fixture
def engine(loaded: BaseModel) -> Iterator[Engine]:
    engine = Engine(loaded, limits=EngineLimits(max_rows=16), host_bytes=HOST_BYTES, device_bytes=DEVICE_BYTES)
    yield engine
    engine.close(0.0)


@dataclass(frozen=True)
class Held:
    """What an engine that has nothing to do holds, in bytes; ``python`` is what tracemalloc knows of."""

    python: int
    resident: int
    device: int
    cache: int
    pool: int
    store: int


def held_by(engine: Engine) -> Held:
    worker: Any = engine._worker
    wait_for(lambda: engine.stats().running == 0)
    gc.collect()
    store = worker._store.stats()
    assert store.pinned_bytes == 0
    assert all(held.pins == 0 for held in worker._pool._held.values())
    assert not worker._jobs
    on_device = engine.base.device.type == "cuda"
    return Held(
        tracemalloc.get_traced_memory()[0],
        _resident_bytes(),
        torch.cuda.memory_allocated() if on_device else 0,
        worker._running.cache_bytes,
        worker._pool.size_bytes,
        store.bytes,
    )


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def work(engine: Engine, requests: list[Request], count: int, pick: random.Random) -> None:
    """So many requests, some of which end early, fail or are too late; adapters are forgotten meanwhile."""
    for first in range(0, count, 40):
        some = [pick.choice(requests) for _ in range(min(40, count - first))]
        some[::13] = [replace(request, timeout_s=pick.choice((1e-6, 0.01))) for request in some[::13]]
        tickets = [engine.submit(request, stream=pick.random() < 0.3) for request in some]
        for ticket in tickets[:: pick.randint(3, 9)]:
            ticket.cancel()
        for ticket in tickets:
            try:
                ticket.result(PATIENCE_S)
            except GenerationError:
                continue
        route = some[-1].route
        for member in route.members:
            engine.forget(member.adapter.digest)


@pytest.mark.parametrize(
    ("count", "loads"), [(800, 100), pytest.param(5000, 500, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_memory_stays_flat(engine: Engine, adapters: list[Adapter], count: int, loads: int) -> None:
    pick = random.Random(6)
    requests = [random_request(pick, adapters) for _ in range(200)]
    tracemalloc.start()
    try:
        work(engine, requests, 1200, random.Random(7))  # metrics keep the last 1000 durations, routes their terms
        before, read = held_by(engine), engine._worker._store.stats().loads
        work(engine, requests, count, random.Random(8))
        after, stats = held_by(engine), engine.stats()
    finally:
        tracemalloc.stop()
    assert engine._worker._store.stats().loads - read >= loads
    assert stats.host.evictions > loads / 4
    assert stats.device.evictions > loads / 4
    assert stats.requests["cancelled"] > 0
    assert stats.requests["deadline"] > 0
    # A request that left a hundred bytes behind would show.
    assert after.python - before.python < 80_000
    assert after.resident - before.resident < 24 << 20
    assert after.device <= before.device + DEVICE_BYTES
    assert after.store <= HOST_BYTES
    assert after.pool <= DEVICE_BYTES
    assert after.cache <= before.cache * 2
    assert_nothing_is_left(engine)


def test_a_burst_is_given_back_when_it_is_over(
    engine: Engine, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran at once may need more than the budgets; nothing of that stays."""
    from lora_hub_sdk.engine import kv_cache, worker

    monkeypatch.setattr(worker, "_LINGER_S", 0.01)
    monkeypatch.setattr(kv_cache, "_IDLE_BYTES", 100_000)
    pick = random.Random(3)
    largest = Engine(engine.base, limits=EngineLimits(max_rows=64), host_bytes=1000, device_bytes=2 * RANK_BYTES)
    most = {"pool": 0, "store": 0, "cache": 0}
    tickets = largest.submit_many([random_request(pick, adapters) for _ in range(64)])
    inside: Any = largest._worker
    while wait([ticket.future for ticket in tickets], 0.001).not_done:
        for name, bytes_ in (
            ("pool", inside._pool.size_bytes),
            ("store", inside._store.stats().bytes),
            ("cache", inside._running.cache_bytes),
        ):
            most[name] = max(most[name], bytes_)
    wait_for(lambda: inside._thread is None)
    held = inside._store.stats().bytes, inside._pool.size_bytes, inside._running.cache_bytes
    assert held[0] <= 1000 < most["store"]
    assert held[1] <= 2 * RANK_BYTES < most["pool"]
    assert held[2] <= 100_000
    assert_nothing_is_left(largest)
