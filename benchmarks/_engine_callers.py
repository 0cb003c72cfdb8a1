"""Part "callers": many single calls at once, and a short request that arrives while long ones decode."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

from langchain_lora_hub import LoraRetrieverLLM

from benchmarks._report import Asked, Report, machine, spread, throughput_ratio
from benchmarks._rounds import in_turns
from benchmarks._systems import request
from benchmarks._workload import Model, Sizes, build_workload, random_prompt
from lora_hub_sdk import LoraHub
from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.types import Adapter, Completion

#: Throughput of single calls at once / of one batch.
ASKED_CALLS: Final = Asked(0.9)
#: Time to the first token / the median decoding step.
ASKED_ARRIVAL: Final = Asked(3.0, most=True)
_SHORT: Final = 16
#: Steps of the long ones alone, before anything arrives; at the first few, rows still join.
_ALONE: Final = (4, 24)


def measure_calls(reference: str, folders: Sequence[Path], dtype: str, sizes: Sizes, *, calls: int) -> Report:
    """One ``ainvoke`` for each prompt, all at once, and one ``batch`` of the same prompts.

    Args:
        reference: the base model, as a hub is told it.
        folders: an adapter for each task of the demo, whose samples and prompts are taken.
    """
    tasks = demo_adapters()
    prompts = [tasks[place % len(tasks)].heldout[place // len(tasks)].inputs for place in range(calls)]
    with TemporaryDirectory(prefix="lora-hub-bench-") as folder, LoraHub(f"{folder}/hub.db", offline=True) as hub:
        for task, own in zip(tasks, folders, strict=True):
            hub.register(own, name=task.name, base_model=reference, samples=task.samples)
        model: Any = LoraRetrieverLLM
        llm = model(hub=hub, base_model=reference, dtype=dtype, k=sizes.k, max_new_tokens=sizes.new_tokens)

        async def at_once() -> list[str]:
            return list(await asyncio.gather(*(llm.ainvoke(prompt) for prompt in prompts)))

        single, together = asyncio.run(at_once()), llm.batch(prompts)
        seconds = in_turns(
            {"ainvoke": lambda: asyncio.run(at_once()), "batch": lambda: llm.batch(prompts)},
            sizes.rounds,
            warm_up=False,
        )
    equal = sum(own == other for own, other in zip(single, together, strict=True))
    return Report(
        machine=machine(),
        settings={"part": "callers", "base_model": reference, "dtype": dtype, **asdict(sizes), "calls": calls},
        systems={f"{name}, s": spread(taken) for name, taken in seconds.items()},
        ratios={f"{calls} x ainvoke / batch": ASKED_CALLS.of(throughput_ratio(seconds, "ainvoke", "batch"))},
        agree={"ainvoke == batch": {"rows_equal": equal, "rows": calls}},
    )


def measure_arrivals(model: Model, adapters: Sequence[Adapter], sizes: Sizes, *, long_tokens: int) -> Report:
    """All rows but one decode ``long_tokens`` each; short prompts arrive one after the other, at any time in a step."""
    workload, draw = build_workload(adapters, sizes, model.vocabulary), random.Random(0)
    rows = list(zip(workload.prompts, workload.mixture, strict=True))
    long = [request(prompt, route, long_tokens) for prompt, route in rows[:-1]]
    short = request(random_prompt(draw, _SHORT, model.vocabulary), workload.mixture[-1], 2)
    steps: list[float] = []
    first: list[float] = []
    ratios: list[float] = []
    with closing(Engine(model.load())) as engine:
        engine.generate([request(prompt, route, 2) for prompt, route in rows])  # all adapters are resident from here on
        for _ in range(sizes.rounds):
            step, waits = _round(engine, long, short, long_tokens, draw)
            steps.append(step)
            first += waits
            ratios.append(median(waits) / step)
    return Report(
        machine=machine(),
        settings={
            "part": "arrivals",
            "base_model": model.id,
            "dtype": model.dtype,
            **asdict(sizes),
            "long_tokens": long_tokens,
            "short_prompt": _SHORT,
            "arrivals": len(first),
        },
        systems={"decoding step, s": spread(steps), "first token of a short request, s": spread(first)},
        ratios={"first token / step": ASKED_ARRIVAL.of(spread(ratios))},
    )


def _round(
    engine: Engine, long: Sequence[Request], short: Request, long_tokens: int, draw: random.Random
) -> tuple[float, list[float]]:
    """The median step of the long ones alone, and how long each short one waited for its first token."""
    came: list[float] = []

    def watch() -> None:
        for piece in engine.stream(long[0]):
            if isinstance(piece, Completion):
                return
            came.append(perf_counter())

    waits: list[float] = []
    begin, end = (min(place, long_tokens - 2) for place in _ALONE)
    with ThreadPoolExecutor(2) as pool:
        watched, others = pool.submit(watch), pool.submit(engine.generate, long[1:])
        while len(came) < end and not watched.done():
            time.sleep(0.002)
        step = median(later - sooner for sooner, later in pairwise(came[begin : end + 1]))
        while not waits or len(came) < long_tokens * 3 // 4:
            time.sleep(draw.uniform(2, 4) * step)
            start = perf_counter()
            pieces = engine.stream(short)
            next(pieces)
            waits.append(perf_counter() - start)
            for _ in pieces:
                pass
        watched.result()
        others.result()
    return step, waits
