"""Many callers at once, from threads and asyncio: each gets what its request would have got alone."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.errors import RequestCancelledError
from lora_hub_sdk.messages import Piece
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Adapter, Completion, Sampling
from tests.engine.crowd import (
    PATIENCE_S,
    RANK_BYTES,
    adapters_in,
    answers_alone,
    assert_nothing_is_left,
    cuda_or_skip,
    random_request,
    random_route,
    same,
    with_stop,
)
from tests.support import adapter_at, route_of

THREADS = 16
ADAPTERS = 200
REQUESTS = 1000


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def loaded(base: Path, request: pytest.FixtureRequest) -> BaseModel:
    device = cuda_or_skip(request.param)
    return load_base_model(resolve_model(base), ModelSettings(dtype="float32", device=device))


@dataclass(frozen=True)
class Crowd:
    """Requests with the answers that they got alone. ``old`` adapters have ``new`` content under the same names."""

    requests: list[Request]
    alone: list[Completion]
    old: list[Adapter]
    new: list[Adapter]

    def pick(self, random_: random.Random, count: int) -> list[int]:
        return [random_.randrange(len(self.requests)) for _ in range(count)]


@pytest.fixture(scope="module")
def crowd(base: Path, loaded: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    folder = tmp_path_factory.mktemp("crowd")
    old = adapters_in(folder / "old", base, ADAPTERS, variants=True)
    new = adapters_in(folder / "new", base, ADAPTERS // 4, seed=1000, variants=True)
    assert [adapter.name for adapter in new] == [adapter.name for adapter in old[: len(new)]]
    pick = random.Random(5)
    requests = [random_request(pick, old) for _ in range(110)] + [random_request(pick, new) for _ in range(30)]
    alone = answers_alone(loaded, requests)
    stopped = [with_stop(*pair) for pair in zip(requests[::4], alone[::4], strict=True)]
    return Crowd(requests + stopped, alone + answers_alone(loaded, stopped), old, new)


@pytest.fixture
def engine(loaded: BaseModel) -> Engine:
    """Room for few adapters and few rows, so that everything is put out and read again all the time."""
    return Engine(
        loaded,
        limits=EngineLimits(max_rows=24, max_tokens=24 * 150, prefill_tokens=600),
        host_bytes=200_000,
        device_bytes=150 * RANK_BYTES,
    )


def churn(engine: Engine, crowd: Crowd, stop: threading.Event) -> None:
    """Adapters are removed, and others come under their names, while all of them are in use."""
    pick = random.Random(9)
    while not stop.wait(0.005):
        engine.forget(pick.choice([*crowd.old, *crowd.new]).digest)


def test_threads_get_what_they_would_get_alone(engine: Engine, crowd: Crowd) -> None:
    wrong: list[object] = []
    kept: list[int] = []

    def work(seed: int) -> None:
        pick = random.Random(seed)
        for at in crowd.pick(pick, REQUESTS // THREADS + 1):
            time.sleep(pick.random() * 0.004)
            request, alone = crowd.requests[at], crowd.alone[at]
            try:
                found = _WAYS[pick.choice(tuple(_WAYS))](engine, request, pick)
            except Exception as error:
                wrong.append(error)
                continue
            if found is not None:
                kept.append(at)
                if not same(found, alone):
                    wrong.append((request, found, alone))

    over = threading.Event()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    churning = threading.Thread(target=churn, args=(engine, crowd, over))
    for thread in (*threads, churning):
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    over.set()
    churning.join()
    assert wrong == []
    _assert_busy(engine, answered=len(kept), of=REQUESTS)


def test_tasks_get_what_they_would_get_alone(engine: Engine, crowd: Crowd) -> None:
    async def ask(seed: int) -> bool:
        pick = random.Random(seed)
        (at,) = crowd.pick(pick, 1)
        await asyncio.sleep(pick.random() * REQUESTS * 0.002)
        found = await _ATASKS[pick.choice(tuple(_ATASKS))](engine, crowd.requests[at], pick)
        if found is None:
            return False
        assert same(found, crowd.alone[at]), (crowd.requests[at], found, crowd.alone[at])
        return True

    async def main() -> list[bool]:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*(ask(seed) for seed in range(REQUESTS)))

    over = threading.Event()
    churning = threading.Thread(target=churn, args=(engine, crowd, over))
    churning.start()
    try:
        kept = asyncio.run(main())
    finally:
        over.set()
        churning.join()
    _assert_busy(engine, answered=sum(kept), of=REQUESTS)


def _assert_busy(engine: Engine, *, answered: int, of: int) -> None:
    """The crowd was one: most were answered, some left early, together, and adapters came and went."""
    stats = engine.stats()
    assert answered > 0.6 * of
    assert stats.requests["cancelled"] > 0.02 * of
    assert stats.requests["error"] == stats.requests["deadline"] == stats.requests["busy"] == 0
    assert stats.requests["stop"] > 0
    assert stats.requests["length"] > 0
    assert stats.steps < 0.5 * stats.completion_tokens  # or nobody shared a step
    assert stats.host.evictions > 0
    assert stats.device.evictions > 0
    assert stats.splits == 0
    assert_nothing_is_left(engine)


# -- the ways to ask, and to leave: an answer, or None where the caller left ----------------------------------------


def _generate(engine: Engine, request: Request, _: random.Random) -> Completion | None:
    return engine.generate([request])[0]


def _submit(engine: Engine, request: Request, _: random.Random) -> Completion | None:
    return engine.submit(request).result(PATIENCE_S)


def _together(engine: Engine, request: Request, pick: random.Random) -> Completion | None:
    tickets = engine.submit_many([request] * pick.randint(2, 3))
    first, *others = (ticket.result(PATIENCE_S) for ticket in tickets)
    assert all(same(other, first) for other in others)
    return first


def _stream(engine: Engine, request: Request, _: random.Random) -> Completion | None:
    return _whole(list(engine.stream(request)))


def _cancel(engine: Engine, request: Request, pick: random.Random) -> Completion | None:
    ticket = engine.submit(request, stream=pick.random() < 0.5)
    time.sleep(pick.choice((0.0, 0.002, 0.01, 0.03)))
    ticket.cancel()
    try:
        return ticket.result(PATIENCE_S)
    except RequestCancelledError:
        return None


def _leave_stream(engine: Engine, request: Request, pick: random.Random) -> Completion | None:
    stream = engine.submit(request, stream=True).pieces()
    last = next(stream)
    stream.close()
    return last if isinstance(last, Completion) else None


_WAYS: dict[str, Callable[[Engine, Request, random.Random], Completion | None]] = {
    "generate": _generate,
    "submit": _submit,
    "together": _together,
    "stream": _stream,
    "cancel": _cancel,
    "leave": _leave_stream,
}


async def _agenerate(engine: Engine, request: Request, _: random.Random) -> Completion | None:
    return (await engine.agenerate([request]))[0]


async def _aresult(engine: Engine, request: Request, _: random.Random) -> Completion | None:
    return await engine.submit(request).aresult()


async def _astream(engine: Engine, request: Request, _: random.Random) -> Completion | None:
    return _whole([piece async for piece in engine.astream(request)])


async def _acancel(engine: Engine, request: Request, pick: random.Random) -> Completion | None:
    task = asyncio.ensure_future(engine.agenerate([request]))
    await asyncio.sleep(pick.choice((0.0, 0.01, 0.1)))
    task.cancel()
    try:
        return (await task)[0]
    except asyncio.CancelledError:
        return None


async def _aleave(engine: Engine, request: Request, pick: random.Random) -> Completion | None:
    stream: Any = engine.astream(request)
    last: Piece | Completion = await anext(stream)
    await stream.aclose()
    return last if isinstance(last, Completion) else None


_ATASKS: dict[str, Callable[[Engine, Request, random.Random], Any]] = {
    "agenerate": _agenerate,
    "aresult": _aresult,
    "astream": _astream,
    "acancel": _acancel,
    "aleave": _aleave,
}


def _whole(pieces: list[Piece | Completion]) -> Completion:
    *texts, last = pieces
    assert isinstance(last, Completion)
    assert "".join(cast("list[str]", texts)) == last.text
    return last


# -- an adapter that cannot be overheard ----------------------------------------------------------------------------


def loud_adapter(folder: Path, base: Path, letter: str) -> Adapter:
    """Whatever is asked, it drowns the base model's own state: next comes a letter, or the one least like it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = "base_model.model.model.layers.1.mlp.down_proj"
    tiny_adapter(folder, base, rank=1, alpha=1.0, modules=("down_proj",), layers=(1,))
    tensors = load_file(folder / "adapter_model.safetensors")
    token = AutoTokenizer.from_pretrained(base)(letter)["input_ids"][0]
    toward = AutoModelForCausalLM.from_pretrained(base).lm_head.weight[token].detach()
    tensors[f"{path}.lora_B.weight"] = 1e2 * toward[:, None].contiguous()
    tensors[f"{path}.lora_A.weight"] = torch.ones_like(tensors[f"{path}.lora_A.weight"])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter_at(folder, base, id=999)


def test_an_adapter_is_never_heard_in_another_row(base: Path, loaded: BaseModel, crowd: Crowd, tmp_path: Path) -> None:
    pick = random.Random(3)
    asked = [Request(f"prompt {place}", random_route(pick, crowd.old[:40]), Sampling(12)) for place in range(24)]
    alone = answers_alone(loaded, asked)
    said = "".join(answer.text for answer in alone)
    letter = next(letter for letter in "ZQXJKVWYBGF" if letter not in said)
    loud = loud_adapter(tmp_path / "loud", base, letter)
    shouted = [Request(f"shout {place}", route_of("selection", (loud, 20.0)), Sampling(12)) for place in range(40)]
    shouts = answers_alone(loaded, shouted)
    clear = [place for place, shout in enumerate(shouts) if shout.text.count(letter) > 2]
    assert len(clear) > 4

    # Its rows of the pool are soon somebody else's: there is room for little more than what runs.
    engine = Engine(loaded, limits=EngineLimits(max_rows=12, gather_s=0.0), device_bytes=64 * RANK_BYTES)
    heard = 0
    for _ in range(40):
        quiet, loudly_asked = pick.sample(range(24), 10), pick.sample(clear, 4)
        mixed = [*((place, False) for place in quiet), *((place, True) for place in loudly_asked)]
        pick.shuffle(mixed)
        tickets = []
        for place, loudly in mixed:
            tickets.append(engine.submit((shouted if loudly else asked)[place]))
            time.sleep(pick.choice((0.0, 0.0, 0.001, 0.004)))
            if loudly and pick.random() < 0.4:
                tickets[-1].cancel()
        for (place, loudly), ticket in zip(mixed, tickets, strict=True):
            if loudly and ticket.future.cancelled():
                continue
            found = ticket.result(PATIENCE_S)
            assert (letter in found.text) == loudly
            assert same(found, (shouts if loudly else alone)[place])
            heard += loudly
    stats = engine.stats()
    assert heard > 40
    assert stats.requests["cancelled"] > 10
    assert stats.device.evictions > 40
    assert_nothing_is_left(engine)
