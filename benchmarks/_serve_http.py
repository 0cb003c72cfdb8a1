"""Parts "http" and "first_token": requests to a server of its own process beside the same calls without HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import httpx

from benchmarks import _serve_pool as pool
from benchmarks._report import Asked, Report, machine, spread, throughput_ratio
from benchmarks._rounds import timed
from benchmarks._workload import Sizes
from lora_hub_sdk import LoraHub, ModelSettings, Routing, Sampling
from lora_hub_sdk.types import Completion

#: Throughput over HTTP / of the same calls in one process.
ASKED_HTTP: Final = Asked(0.9)
_START_S: Final = 120.0
#: Long answers that are on their way when a short one comes.
_LONG: Final = 15


def measure_http(database: Path, base_model: str, dtype: Any, sizes: Sizes, *, at_once: int) -> Report:
    """So many requests at once: chat over HTTP, and the same conversations by ``hub.agenerate``."""
    asked = pool.prompts(at_once)

    async def by_hub(hub: LoraHub) -> list[Completion]:
        calls = (hub.agenerate([prompt], **_hub_options(base_model, dtype, sizes)) for prompt in asked)
        return [completion for (completion,) in await asyncio.gather(*calls)]

    async def by_http(url: str) -> list[dict[str, Any]]:
        async with _client(url) as client:
            bodies = [_body(prompt, sizes) for prompt in asked]
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
        return [answer.raise_for_status().json() for answer in answers]

    seconds: dict[str, list[float]] = {"hub": [], "HTTP": []}
    with LoraHub(database, offline=True) as hub, _serving(database, base_model, dtype, sizes) as url:
        texts = [one.text for one in asyncio.run(by_hub(hub))]
        served = [answer["choices"][0]["message"]["content"] or "" for answer in asyncio.run(by_http(url))]
        for _ in range(sizes.rounds):
            seconds["hub"].append(timed(lambda: asyncio.run(by_hub(hub))))
            seconds["HTTP"].append(timed(lambda: asyncio.run(by_http(url))))
    return Report(
        machine=machine(),
        settings={"part": "http", "base_model": base_model, "dtype": dtype, **asdict(sizes), "at_once": at_once},
        systems={f"{name}, s": spread(taken) for name, taken in seconds.items()},
        ratios={f"{at_once} at once, HTTP / hub": ASKED_HTTP.of(throughput_ratio(seconds, "HTTP", "hub"))},
        agree={
            "HTTP == hub": {"rows_equal": sum(a == b for a, b in zip(texts, served, strict=True)), "rows": len(texts)}
        },
    )


def measure_first_token(database: Path, base_model: str, dtype: Any, sizes: Sizes, *, long_tokens: int) -> Report:
    """Long answers decode; a short request comes: until its first text, by HTTP and without, alone and beside them."""
    asked = pool.prompts(_LONG + 1)
    *long, short = asked
    waits: dict[str, list[float]] = {}
    with LoraHub(database, offline=True) as hub, _serving(database, base_model, dtype, sizes) as url:
        for number in range(sizes.rounds + 1):
            for loaded in (False, True):
                others: Sequence[str] = long if loaded else ()
                name = f"{'beside ' + str(_LONG) if loaded else 'alone'}"
                found = {
                    f"hub, {name}": asyncio.run(
                        _first_by_hub(hub, base_model, dtype, sizes, short, others, long_tokens)
                    ),
                    f"HTTP, {name}": asyncio.run(_first_by_http(url, sizes, short, others, long_tokens)),
                }
                for way, taken in found.items():
                    if number:  # the first round warms up
                        waits.setdefault(way, []).append(taken)
    ratios = {
        f"{state}: HTTP / hub": spread(
            [a / b for a, b in zip(waits[f"HTTP, {state}"], waits[f"hub, {state}"], strict=True)]
        )
        for state in ("alone", f"beside {_LONG}")
    }
    return Report(
        machine=machine(),
        settings={
            "part": "first_token",
            "base_model": base_model,
            "dtype": dtype,
            **asdict(sizes),
            "long_tokens": long_tokens,
        },
        systems={f"{way}, s": spread(taken) for way, taken in waits.items()},
        ratios=ratios,
    )


async def _first_by_hub(
    hub: LoraHub, base_model: str, dtype: Any, sizes: Sizes, short: str, others: Sequence[str], long_tokens: int
) -> float:
    async def first(prompt: str, tokens: int, came: asyncio.Event | None = None) -> float:
        start, waited = perf_counter(), 0.0
        async for _ in hub.astream(prompt, **_hub_options(base_model, dtype, sizes, tokens)):
            waited = waited or perf_counter() - start
            if came is not None:
                came.set()
        return waited

    return await _beside(first, short, others, sizes.new_tokens, long_tokens)


async def _first_by_http(url: str, sizes: Sizes, short: str, others: Sequence[str], long_tokens: int) -> float:
    async with _client(url) as client:

        async def first(prompt: str, tokens: int, came: asyncio.Event | None = None) -> float:
            start, waited = perf_counter(), 0.0
            body = {**_body(prompt, sizes, tokens), "stream": True}
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if '"content":"' in line.replace(": ", ":") and '"content":""' not in line.replace(": ", ":"):
                        waited = waited or perf_counter() - start
                        if came is not None:
                            came.set()
            return waited

        return await _beside(first, short, others, sizes.new_tokens, long_tokens)


async def _beside(first: Any, short: str, others: Sequence[str], tokens: int, long_tokens: int) -> float:
    """How long the short one waits once all the others are decoding."""
    came = [asyncio.Event() for _ in others]
    running = [asyncio.create_task(first(one, long_tokens, event)) for one, event in zip(others, came, strict=True)]
    for event in came:
        await event.wait()
    waited: float = await first(short, tokens)
    assert not any(task.done() for task in running), "the long ones ended before the short one: raise --long-tokens"
    await asyncio.gather(*running)
    return waited


@contextmanager
def _serving(database: Path, base_model: str, dtype: str, sizes: Sizes) -> Iterator[str]:
    """The address of a server over the registry, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-c", "from lora_hub_sdk.cli import main; main()", "serve", "--database", str(database)),
        *("--base-model", base_model, "--dtype", dtype, "-k", str(sizes.k), "--port", str(port)),
        *("--auth", "none", "--offline"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(sizes.threads)}
    )
    try:
        until = time.monotonic() + _START_S
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not come up: {command}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits)


def _body(prompt: str, sizes: Sizes, tokens: int | None = None) -> dict[str, Any]:
    return {
        "model": "auto",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens or sizes.new_tokens,
        "temperature": 0,
    }


def _hub_options(base_model: str, dtype: Any, sizes: Sizes, tokens: int | None = None) -> dict[str, Any]:
    return {
        "base_model": base_model,
        "routing": Routing(k=sizes.k),
        "sampling": Sampling(tokens or sizes.new_tokens),
        "settings": ModelSettings(dtype),
    }
