"""Many requests at once: a varied pool of tiny adapters, requests of every kind, and a look into the engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.batch_lora import BatchLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from lora_hub_sdk.types import Adapter, Completion, Route, Sampling
from tests.support import adapter_at, route_of

#: Far more than anything here takes: whoever waits so long waits for ever.
PATIENCE_S = 120.0
#: Bytes of one rank in every module of the tiny model.
RANK_BYTES = 3712
_MODULES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ATTENTION,
    MLP,
    (*ATTENTION, *MLP),
    ("down_proj",),
    ("k_proj", "o_proj", "gate_proj"),
)
#: What else an adapter may be, beside plain LoRA; none of it changes how many ranks it has.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {"dora": True},
    {"modules_to_save": ("norm", "input_layernorm")},
    {"modules_to_save": ("lm_head",)},
    {"modules": ("q_proj", "embed_tokens", "lm_head")},
)
_WORDS = ("river", "is", "of", "seven", "añil", "12 + 5", "x" * 40, "why", "the lamp", "Grüße", "?")


def adapters_in(folder: Path, base: Path, count: int, *, seed: int = 0, variants: bool = False) -> list[Adapter]:
    """Adapters named ``lora-0`` on: ranks 1 to 16, different modules, layers and scales.

    With ``variants`` every third is more than plain LoRA.
    """
    pick = random.Random(seed)
    found = []
    for place in range(count):
        spec: dict[str, Any] = {
            "rank": pick.choice((1, 2, 3, 4, 6, 8, 16)),
            "alpha": pick.choice((1.0, 4.0, 8.0, 16.0)),
            "seed": seed + place,
            "modules": pick.choice(_MODULES),
            "layers": pick.choice((None, None, (0,), (1,))),
            "rslora": pick.random() < 0.3,
        }
        if variants and place % 3 == 0:
            spec |= {"layers": None} | _VARIANTS[place // 3 % len(_VARIANTS)]
        found.append(adapter_at(tiny_adapter(folder / f"lora-{place}", base, **spec), base, id=place + 1))
    return found


def random_route(pick: random.Random, adapters: Sequence[Adapter]) -> Route:
    """Any strategy, of none to four adapters with weights of their own."""
    strategy = pick.choice(("base", "selection", "mixture", "mixture", "fusion", "fusion"))
    count = {"base": 0, "selection": 1}.get(strategy, pick.randint(0, 4))
    chosen = pick.sample(list(adapters), count)
    weights = [pick.choice((0.1, 0.25, 0.5, 1.0)) for _ in chosen]
    return route_of(strategy, *zip(chosen, weights, strict=True))


def random_request(pick: random.Random, adapters: Sequence[Adapter], **options: Any) -> Request:
    """Greedy or sampled with a seed, short or long."""
    sampling = Sampling(
        pick.randint(1, 12),
        temperature=pick.choice((0.0, 0.0, 0.7, 1.3)),
        top_p=pick.choice((1.0, 0.9)),
        top_k=pick.choice((0, 0, 5)),
        seed=pick.randint(0, 999),
    )
    prompt = " ".join(pick.choice(_WORDS) for _ in range(pick.randint(1, 4)))
    return Request(prompt, random_route(pick, adapters), sampling, **options)


def answers_alone(base: BaseModel, requests: Iterable[Request]) -> list[Completion]:
    """Each request answered by an engine that does nothing else meanwhile."""
    engine = Engine(base, limits=EngineLimits(max_rows=1, gather_s=0.0))
    try:
        return [engine.generate([request])[0] for request in requests]
    finally:
        engine.close()


def with_stop(request: Request, alone: Completion) -> Request:
    """The same request, which now ends in the midst of its answer."""
    mark = alone.text[len(alone.text) // 2 :][:2]
    return replace(request, sampling=replace(request.sampling, stop=("never comes", mark))) if mark else request


def same(found: Completion, alone: Completion) -> bool:
    """Whether an answer, its end and its counts are those of the request alone, and its route the one asked for."""
    return replace(found, trace=replace(found.trace, batch_size=alone.trace.batch_size)) == alone


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; fails where it never does."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited for ever"
        time.sleep(0.001)


class Tap:
    """Stands before an engine's forward passes, from the moment it is made. Whatever a hook raises, the pass raises.

    Attributes:
        sizes: rows of each pass, in order.
    """

    def __init__(
        self,
        engine: Engine,
        before: Callable[[BatchLora], None] = lambda _: None,
        after: Callable[[BatchLora, Tensor], None] = lambda _batch, _logits: None,
    ) -> None:
        self.sizes: list[int] = []
        self.before, self.after = before, after
        model: Any = engine._worker._model
        real = model.forward

        def forward(batch: BatchLora, *args: Any, **options: Any) -> Tensor:
            self.sizes.append(len(batch.rows))
            self.before(batch)
            logits: Tensor = real(batch, *args, **options)
            self.after(batch, logits)
            return logits

        model.forward = forward


def rows_with(batch: BatchLora, adapter: Adapter) -> list[int]:
    """The places of the rows that use an adapter."""
    return [place for place, row in enumerate(batch.rows) if adapter.digest in row.terms.digests]


def assert_nothing_is_left(engine: Engine) -> None:
    """Close it: nobody waits or runs, nothing is pinned in either tier, no row holds a place."""
    engine.close()
    worker: Any = engine._worker
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.kv_places) == (0, 0, 0)
    assert (worker._scheduler.waiting, worker._scheduler.running) == (0, 0)
    assert not worker._jobs
    assert not worker._loading
    # A closed store keeps what is pinned, and what is just being read until it is read.
    wait_for(lambda: worker._store.stats().bytes == worker._store.stats().pinned_bytes == 0)
    assert not [digest for digest, held in worker._pool._held.items() if held.pins]


def cuda_or_skip(device: str) -> str:
    import pytest

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return device
