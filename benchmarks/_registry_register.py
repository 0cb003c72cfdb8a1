"""How fast adapters come in: through the whole hub from a warm cache, and through SQL alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from benchmarks._registry_data import ENCODER, registration, uniform
from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.source import CARD
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import LocalHub, tiny_adapter

_BASE: Final = "smollm2-135m-instruct"
_WORKERS: Final = 8
_ROUNDS: Final = 3
#: Encoding 20 samples takes far longer than all the rest, so fewer adapters tell as much.
_EMBEDDED_SHARE: Final = 8
_DELAYED_SHARE: Final = 4
#: Seconds that a Hub across the internet takes for an answer.
_DELAY: Final = 0.05
_ROWS_ADDED: Final = 200

Request = dict[str, Any]
Register = Callable[[LoraHub, Sequence[Request]], object]


@dataclass(frozen=True, slots=True)
class Rate:
    """Adapters per second of one way to register, the median of some rounds."""

    way: str
    adapters: int
    per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """``weights_bytes`` is the size of one adapter's weights; ``ratios`` are of medians."""

    weights_bytes: int
    samples: int
    rates: tuple[Rate, ...]
    ratios: dict[str, float]


def measure_registering(folder: Path, adapters: int) -> Rates:
    """Register random adapters of a real base model's shapes, from a LocalHub and a cache that holds them all.

    A registration by a branch asks the Hub for the branch's commit, also when every file is in the cache; that request
    is inside. The LocalHub is a thread of this process and answers at once, so workers have nothing to wait for; for
    some of the ways it waits 50 ms as one far away would, for two of these with an empty cache. Each round has a new
    database.
    """
    published = _published(folder / "published", adapters)
    with LocalHub(folder / "published") as hub:
        encoder = SentenceEncoder(resolve_model("all-minilm-l6-v2", offline=True))
        encoder.encode(["load the model now"])
        samples = [adapter.samples for adapter in demo_adapters()]
        given = [
            {"reference": name, "embedding": vector}
            for name, vector in zip(published, uniform(adapters, seed=1), strict=True)
        ]
        embedded = [
            {"reference": name, "samples": samples[place % len(samples)]}
            for place, name in enumerate(published[: max(1, adapters // _EMBEDDED_SHARE)])
        ]
        options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": folder / "cache", "encoder": encoder}
        _timed(folder / "warm.db", options, given, _together)
        far = given[: max(1, adapters // _DELAYED_SHARE)]
        ways: dict[str, tuple[list[Request], Register, float]] = {
            "register, vector given": (given, _one_by_one, 0.0),
            "register_many(workers=8), vector given": (given, _together, 0.0),
            "register, vector given, far Hub": (far, _one_by_one, _DELAY),
            "register_many(workers=8), vector given, far Hub": (far, _together, _DELAY),
            "register, vector given, far Hub, empty cache": (far, _one_by_one, _DELAY),
            "register_many(workers=8), vector given, far Hub, empty cache": (far, _together, _DELAY),
            "register, samples embedded": (embedded, _one_by_one, 0.0),
            "register_many(workers=8), samples embedded": (embedded, _together, 0.0),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(_ROUNDS):
            for number, (way, (requests, register, delay)) in enumerate(ways.items()):
                hub.delay(delay)
                database = folder / f"{turn}-{number}.db"
                cache = folder / (f"cache-{turn}-{number}" if way.endswith("empty cache") else "cache")
                seconds[way].append(_timed(database, {**options, "cache_dir": cache}, requests, register))
    rates = [Rate(way, len(requests), len(requests) / median(seconds[way])) for way, (requests, *_) in ways.items()]
    rates.append(_sql_alone(folder))
    speed = {rate.way: rate.per_s for rate in rates}
    one, many, one_far, many_far, one_cold, many_cold, one_embedded, many_embedded, sql = speed.values()
    return Rates(
        weights_bytes=(folder / "published" / published[0] / WEIGHTS_FILE).stat().st_size,
        samples=max(map(len, samples)),
        rates=tuple(rates),
        ratios={
            "register_many / register, vector given": many / one,
            "register_many / register, vector given, far Hub": many_far / one_far,
            "register_many / register, vector given, far Hub, empty cache": many_cold / one_cold,
            "register_many / register, samples embedded": many_embedded / one_embedded,
            "samples embedded / vector given, one by one": one_embedded / one,
            "Registry.add / register, vector given": sql / one,
        },
    )


def _published(folder: Path, count: int) -> list[str]:
    """Adapters of rank 8 on two projections of every layer, in bfloat16, by their repositories' ids."""
    base = resolve_model(_BASE, config_only=True, offline=True).folder
    names = [f"bench/random-{seed:04d}" for seed in range(count)]
    for seed, name in enumerate(names):
        tiny_adapter(folder / name, base, rank=8, alpha=2.0, seed=seed, dtype="bfloat16", base_name=_BASE)
        (folder / name / CARD).write_text(
            f"---\nlicense: apache-2.0\ntags: [lora]\n---\nAdapter {seed}, made at random.\n"
        )
    return names


def _timed(
    database: Path,
    options: dict[str, Any],
    requests: Sequence[Request],
    register: Register,
) -> float:
    with LoraHub(database, **options) as hub:
        start = perf_counter()
        register(hub, requests)
        taken = perf_counter() - start
        assert len(hub.list()) == len(requests)
    return taken


def _one_by_one(hub: LoraHub, requests: Sequence[Request]) -> None:
    for request in requests:
        hub.register(**request)


def _together(hub: LoraHub, requests: Sequence[Request]) -> None:
    for outcome in hub.register_many(requests, workers=_WORKERS):
        if outcome.error is not None:
            raise outcome.error


def _sql_alone(folder: Path) -> Rate:
    """``Registry.add`` with everything ready, 20 samples and three tags each; one commit to the disk for each."""
    registry = Registry(str(folder / "rows.db"), index="exact", encoder=lambda: ENCODER, actor="bench")
    vectors = uniform(_ROWS_ADDED + 1, seed=2)
    rows = [registration(place, vector, "default") for place, vector in enumerate(vectors)]
    try:
        registry.add(rows[0])
        start = perf_counter()
        for row in rows[1:]:
            registry.add(row)
        return Rate("Registry.add", _ROWS_ADDED, _ROWS_ADDED / (perf_counter() - start))
    finally:
        registry.close()
