"""Part "zipf": a stream of requests over many adapters, with memory for a tenth of them and with memory for all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from typing import Any, Final

from benchmarks._report import Asked, Report, machine, spread, throughput_ratio
from benchmarks._rounds import in_turns
from benchmarks._systems import request
from benchmarks._workload import Model, Sizes, mixture_of, random_prompt
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.types import Adapter, Completion

#: Throughput with memory for some / with memory for all.
ASKED: Final = Asked(0.8)
_RESIDENT: Final = "all resident"


def measure_zipf(model: Model, adapters: Sequence[Adapter], sizes: Sizes, *, requests: int, budget: int) -> Report:
    """Both engines answer the same stream, ``sizes.batch`` requests at any time; see ``zipf_stream``.

    Args:
        budget: how many adapters the memory is for, the host's as well as the device's.
    """
    limited = f"memory for {budget}"
    stream = zipf_stream(adapters, sizes, model.vocabulary, requests)
    factors = load_factors(adapters[0])
    # The pool holds the model's dtype, whatever the files have.
    numbers = sum(one.a.numel() + one.b.numel() for one in factors.modules.values())
    base = model.load()
    host, device = factors.size_bytes, numbers * base.dtype.itemsize
    with (
        closing(Engine(base, host_bytes=len(adapters) * host, device_bytes=len(adapters) * device)) as resident,
        closing(Engine(model.load(), host_bytes=budget * host, device_bytes=budget * device)) as small,
    ):
        engines = {_RESIDENT: resident, limited: small}
        answers = {name: answer_all(engine, stream, sizes.batch) for name, engine in engines.items()}
        seconds = in_turns(
            {name: partial(answer_all, engine, stream, sizes.batch) for name, engine in engines.items()},
            sizes.rounds,
            warm_up=False,
        )
        held = {name: _held(engine) for name, engine in engines.items()}
    tokens = requests * sizes.new_tokens
    return Report(
        machine=machine(),
        settings={
            "part": "zipf",
            "base_model": model.id,
            "dtype": model.dtype,
            **asdict(sizes),
            "adapters": len(adapters),
            "requests": requests,
            "asked_for": len({member.adapter.digest for one in stream for member in one.route.members}),
        },
        systems={name: {**spread([tokens / taken for taken in seconds[name]]), **held[name]} for name in engines},
        ratios={f"{limited} / {_RESIDENT}": ASKED.of(throughput_ratio(seconds, limited, _RESIDENT))},
        agree={f"{limited} == {_RESIDENT}": _equal(answers[limited], answers[_RESIDENT])},
    )


def zipf_stream(
    adapters: Sequence[Adapter], sizes: Sizes, vocabulary: int, requests: int, *, seed: int = 0
) -> list[Request]:
    """Requests that mix ``sizes.k`` adapters each; the i-th adapter is drawn in proportion to 1 / i (Zipf, s = 1)."""
    draw = random.Random(seed)
    shares = list(accumulate(1 / (place + 1) for place in range(len(adapters))))
    found = []
    for _ in range(requests):
        chosen: dict[int, Adapter] = {}
        while len(chosen) < sizes.k:
            (adapter,) = draw.choices(adapters, cum_weights=shares)
            chosen[adapter.id] = adapter
        prompt = random_prompt(draw, sizes.prompt_tokens, vocabulary)
        found.append(request(prompt, mixture_of(list(chosen.values())), sizes.new_tokens))
    return found


def answer_all(engine: Engine, stream: Sequence[Request], callers: int) -> list[Completion]:
    """So many callers, each asking for the next request of the stream once it has its answer."""
    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(lambda one: engine.generate([one])[0], stream))


def _held(engine: Engine) -> dict[str, Any]:
    stats = engine.stats()
    return {
        "host_adapters": stats.host.adapters,
        "host_evictions": stats.host.evictions,
        "device_adapters": stats.device.adapters,
        "device_evictions": stats.device.evictions,
    }


def _equal(own: Sequence[Completion], other: Sequence[Completion]) -> dict[str, int]:
    equal = sum(left.text == right.text for left, right in zip(own, other, strict=True))
    return {"rows_equal": equal, "rows": len(own)}
