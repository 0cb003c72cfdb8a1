"""Part "cold": what the first token of a prompt waits for an adapter that is on disk only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Final

from benchmarks._report import Asked, Report, machine, spread
from benchmarks._systems import request
from benchmarks._workload import Model, Sizes, mixture_of, random_prompt
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.types import Adapter

#: (first token with the adapter on disk - with it resident) / the latter.
ASKED: Final = Asked(0.1, most=True)


def measure_cold(model: Model, adapters: Sequence[Adapter], sizes: Sizes) -> Report:
    """Each adapter is asked for twice in a row by the same prompt: it comes from disk, then it is there.

    The system's own cache has the files, which were just written; the first two adapters warm up the engine.
    """
    draw, vocabulary = random.Random(0), model.vocabulary
    prompt = random_prompt(draw, sizes.prompt_tokens, vocabulary)
    cold: list[float] = []
    warm: list[float] = []
    tiers: list[str] = []
    with closing(Engine(model.load())) as engine:
        for adapter in adapters:
            found: list[str] = []
            for taken in (cold, warm):
                start = perf_counter()
                (completion,) = engine.generate([request(prompt, mixture_of([adapter]), 1)])
                taken.append(perf_counter() - start)
                found += completion.trace.tiers
            tiers.append(" ".join(found))
    cold, warm = cold[2:], warm[2:]
    added = [(late - soon) / median(warm) for late, soon in zip(cold, warm, strict=True)]
    return Report(
        machine=machine(),
        settings={"part": "cold", "base_model": model.id, "dtype": model.dtype, **asdict(sizes)},
        systems={
            "adapter on disk, s": spread(cold),
            "adapter resident, s": spread(warm),
        },
        ratios={"added / resident": ASKED.of(spread(added))},
        agree={"found on disk, then on the device": {"rows_equal": tiers.count("disk device"), "rows": len(adapters)}},
    )
