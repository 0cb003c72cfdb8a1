"""Many clients at one time: everybody gets the answer that it would get alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_hub_sdk.hub import LoraHub
from tests.server.conftest import SAMPLES
from tests.server.serving import Served


def chat(number: int) -> dict[str, Any]:
    """A request unlike all others: another task, another length, another way."""
    task = [text for samples in SAMPLES.values() for text in samples][number % 6]
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": f"{task} ({number})"}],
        "max_tokens": 4 + number % 9,
    }
    if number % 3 == 0:
        body["model"] = "auto:selection"
    if number % 5 == 0:
        body |= {"temperature": 0.8, "seed": number}
    if number % 7 == 0:
        flag = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "flag", "schema": flag}}
    return body


async def asked(served: Served, bodies: list[dict[str, Any]], at_once: int) -> list[httpx.Response]:
    limits, left = httpx.Limits(max_connections=at_once), iter(enumerate(bodies))
    found: dict[int, httpx.Response] = {}
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits) as client:

        async def ask() -> None:
            for place, body in left:
                found[place] = await client.post("/v1/chat/completions", json=body)

        await asyncio.gather(*(ask() for _ in range(at_once)))
    return [found[place] for place in range(len(bodies))]


def told(answer: httpx.Response) -> tuple[Any, ...]:
    """All of an answer that must not depend on others."""
    assert answer.status_code == 200, answer.text
    data = answer.json()
    (choice,) = data["choices"]
    return choice["message"]["content"], choice["finish_reason"], data["usage"], data["route"]


def test_64_chats_at_one_time_are_answered_as_each_alone(served: Served, filled: LoraHub, chat_base: Path) -> None:
    bodies = [chat(number) for number in range(64)]
    engine = filled.engine(str(chat_base), served.house.model_settings)
    before = engine.batches
    together = asyncio.run(asked(served, bodies, 64))
    shared = engine.batches - before
    alone = asyncio.run(asked(served, bodies, 1))
    assert list(map(told, together)) == list(map(told, alone))
    assert shared < 64, "they did not share the engine's batches"


@pytest.mark.slow
def test_2000_requests_at_32_a_time_leave_nothing_behind(served: Served, filled: LoraHub) -> None:
    bodies = [{**chat(number), "max_tokens": 4} for number in range(2000)]
    for body in bodies:
        body.pop("response_format", None)
    answers = asyncio.run(asked(served, bodies[:400], 32))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers += asyncio.run(asked(served, bodies[400:], 32))
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert {answer.status_code for answer in answers} == {200}
    assert grown_mb < 100, f"the peak grew by {grown_mb:.0f} MB in 1,600 requests"
    assert [(stats.running, stats.waiting) for stats in filled.stats()] == [(0, 0)]
