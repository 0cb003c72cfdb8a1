"""The engines of a hub: made once, by one thread, while others go on."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_hub_sdk.engine.base_model import ModelSettings, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.engines import Engines
from lora_hub_sdk.errors import DeadlineExceededError, EngineClosedError, ModelNotFoundError
from lora_hub_sdk.models import resolve_model
from tests.encoders import Gate

KEY = ("base", ModelSettings())


class Maker:
    """Makes real engines of a tiny model, behind a gate; the first may fail."""

    def __init__(self, base: Path, error: Exception | None = None) -> None:
        self.gate = Gate()
        self._base, self._error = base, error

    def __call__(self) -> Engine:
        self.gate()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return Engine(load_base_model(resolve_model(self._base)))


def test_all_who_ask_meanwhile_get_the_same(base: Path) -> None:
    engines, make = Engines(), Maker(base)

    async def ask() -> list[Engine]:
        return list(await asyncio.gather(*(engines.aget(KEY, make) for _ in range(5))))

    with ThreadPoolExecutor(6) as callers:
        asked = [callers.submit(engines.get, KEY, make) for _ in range(5)]
        tasks = callers.submit(lambda: asyncio.run(ask()))
        assert make.gate.reached.wait(60)
        assert engines.loaded() == []
        make.gate.open()
        found = {*tasks.result(60), *(each.result(60) for each in asked)}
    assert list(found) == engines.loaded()
    assert len(make.gate.calls) == 1
    engines.close()


def test_a_failure_is_for_those_who_waited_and_the_next_tries_again(base: Path) -> None:
    engines, make = Engines(), Maker(base, ModelNotFoundError("base", ["nowhere"]))
    with ThreadPoolExecutor(3) as callers:
        asked = [callers.submit(engines.get, KEY, make) for _ in range(2)]
        asked.append(callers.submit(lambda: asyncio.run(engines.aget(KEY, make))))
        assert make.gate.reached.wait(60)
        make.gate.open()
        failed = [each.exception(60) for each in asked]
    # Whoever came after the failure has an engine.
    assert any(isinstance(error, ModelNotFoundError) for error in failed)
    assert engines.get(KEY, make) in engines.loaded()
    engines.close()


def test_a_caller_who_leaves_takes_nothing_from_the_others(base: Path) -> None:
    engines, make = Engines(), Maker(base)

    async def leave() -> Engine:
        stays, leaves = (asyncio.create_task(engines.aget(KEY, make)) for _ in range(2))
        with pytest.raises(DeadlineExceededError, match="goes on loading"):
            await engines.aget(KEY, make, 0.01)
        leaves.cancel()
        await asyncio.wait([leaves])
        make.gate.open()
        return await stays

    assert [asyncio.run(leave())] == engines.loaded()
    engines.close()


def test_closing_lets_nobody_wait_and_keeps_nothing(base: Path) -> None:
    engines, make = Engines(), Maker(base)
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(engines.get, KEY, make)
        assert make.gate.reached.wait(60)
        engines.close()
        assert isinstance(asked.exception(60), EngineClosedError)
    make.gate.open()
    for thread in threading.enumerate():
        if thread.name == "lora-hub-load-base":
            thread.join(60)
    assert engines.loaded() == []
    engines.close()
    with pytest.raises(EngineClosedError):
        engines.get(KEY, make)
    with pytest.raises(EngineClosedError):
        asyncio.run(engines.aget(KEY, make))
