"""What an engine tells of itself: Prometheus metrics, and a snapshot that a person reads."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import MethodType
from typing import Any, Final, Literal, get_args
from weakref import WeakMethod

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lora_hub_sdk.types import FinishReason, Tier, Timing, Usage

#: How a request ended. "busy" was refused at the door, "error" includes a request that does not fit into memory.
Outcome = Literal["stop", "length", "cancelled", "deadline", "error", "busy"]

_ANSWERED: Final = frozenset(get_args(FinishReason))
_PREFIX: Final = "lora_hub_engine"
_RECENT: Final = 1000
_MINUTE: Final = 60
_WAITS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PASSES: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier of adapters at one moment; ``evictions`` counts since the engine was opened."""

    held_bytes: int = 0
    budget_bytes: int = 0
    adapters: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine holds at one moment. ``kv_places`` are rows times width of the key-value cache.

    ``base_bytes`` is the memory of the base model's weights, copies in another order included.
    """

    waiting: int = 0
    running: int = 0
    kv_places: int = 0
    max_kv_places: int = 0
    base_bytes: int = 0
    host: TierState = field(default_factory=TierState)
    device: TierState = field(default_factory=TierState)


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the slow end of some durations, in seconds: half of them, and 95 of 100, took no longer."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine.

    Counts are since the engine was opened. Tokens are those of requests that ended; ``tokens_per_s`` counts tokens as
    they come, over the last minute. Spreads are over the last 1000 requests, None before the first. Hit rates are
    shares of the adapters that were looked for in that tier, None where none was.
    """

    base_model: str
    waiting: int
    running: int
    kv_places: int
    max_kv_places: int
    base_bytes: int
    requests: dict[Outcome, int]
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    prefills: int
    steps: int
    splits: int
    host: TierState
    device: TierState
    host_hit_rate: float | None
    device_hit_rate: float | None
    queue_s: Spread | None
    first_token_s: Spread | None
    total_s: Spread | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and numbers, fit for JSON."""
        return asdict(self)


class EngineMetrics:
    """Counts what happens in one engine. Thread-safe; each call takes microseconds.

    What happens is told by calls. What is held (rows, bytes, adapters) is asked for when somebody looks.

    Args:
        base_model: the label ``base_model`` of every series.
        state: gives what the engine holds now; called by whoever reads the metrics, in the reader's thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        base_model: str,
        state: Callable[[], EngineState] = EngineState,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_model = base_model
        #: What prometheus_client's own servers and exporters take.
        self.registry = CollectorRegistry()
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = _Rate(clock())
        self._queue, self._first_token, self._total = (deque[float](maxlen=_RECENT) for _ in range(3))

        # Every series is there from the start, at zero: a rate over one that appears with its first event misses it.
        outcomes = self._counter("requests", "Requests that ended, by how they ended.", "outcome")
        self._requests = {outcome: outcomes.labels(base_model, outcome) for outcome in get_args(Outcome)}
        tiers = self._counter("adapters_found", "Adapters of admitted requests, by where they were found.", "tier")
        self._found = {tier: tiers.labels(base_model, tier) for tier in get_args(Tier)}
        self._prompt_tokens = self._counted("prompt_tokens", "Prompt tokens of requests that ended.")
        self._completion_tokens = self._counted("completion_tokens", "Generated tokens of requests that ended.")
        self._prefill_tokens = self._counted("prefill_tokens", "Prompt tokens computed, repetitions included.")
        self._splits = self._counted("splits", "Batches taken apart as a forward pass failed, for memory or a bad row.")
        self._split_rows = self._counted("split_rows", "Rows of batches that were taken apart.")
        self._queue_seconds = self._histogram("queue_seconds", "Submission until admission.", _WAITS)
        self._first_seconds = self._histogram("first_token_seconds", "Submission until the first token.", _WAITS)
        self._total_seconds = self._histogram("request_seconds", "Submission until the complete answer.", _WAITS)
        self._prefill_seconds = self._histogram("prefill_seconds", "One forward pass over new prompts.", _PASSES)
        self._step_seconds = self._histogram("step_seconds", "One decoding step of all running rows.", _PASSES)
        self._step_rows = self._histogram("step_rows", "Rows of one decoding step.", _ROWS)
        self.registry.register(_StateCollector(base_model, _while_there(state)))

    def request_done(self, outcome: Outcome, timing: Timing | None = None, usage: Usage | None = None) -> None:
        """A request ended. ``usage`` tells what it got, also where that is not a complete answer.

        Durations until the answer are those of complete answers only, and until the first token of those that got one:
        a caller who leaves early would look like a quick answer.
        """
        self._requests[outcome].inc()
        if usage is not None:
            self._prompt_tokens.inc(usage.prompt_tokens)
            self._completion_tokens.inc(usage.completion_tokens)
        if timing is None:
            return
        self._observe(self._queue_seconds, self._queue, timing.queue_s)
        if usage is not None and usage.completion_tokens:
            self._observe(self._first_seconds, self._first_token, timing.first_token_s)
        if outcome in _ANSWERED:
            self._observe(self._total_seconds, self._total, timing.total_s)

    def refused(self) -> None:
        """A request was turned away, as too many waited."""
        self._requests["busy"].inc()

    def found(self, tier: Tier, count: int = 1) -> None:
        """Adapters of an admitted request were found in this tier."""
        self._found[tier].inc(count)

    def prefill(self, rows: int, tokens: int, seconds: float) -> None:
        """One forward pass over the ``tokens`` of ``rows`` prompts, which gave each row its first token."""
        self._prefill_seconds.observe(seconds)
        self._prefill_tokens.inc(tokens)
        self._came(rows)

    def step(self, rows: int, seconds: float) -> None:
        """One decoding step, which gave each of ``rows`` its next token."""
        self._step_seconds.observe(seconds)
        self._step_rows.observe(rows)
        self._came(rows)

    def split(self, rows: int) -> None:
        """A forward pass over ``rows`` failed, and its batch is taken apart."""
        self._splits.inc()
        self._split_rows.inc(rows)

    def stats(self) -> EngineStats:
        """What a person wants to know, now."""
        value = {
            (sample.name.removeprefix(f"{_PREFIX}_"), sample.labels.get("outcome") or sample.labels.get("tier")): int(
                sample.value
            )
            for family in self.registry.collect()
            for sample in family.samples
        }
        with self._lock:
            rate = self._rate.per_second(self._clock())
            spreads = [_spread(tuple(recent)) for recent in (self._queue, self._first_token, self._total)]
        found: dict[Tier, int] = {tier: value["adapters_found_total", tier] for tier in get_args(Tier)}
        host, device = (
            TierState(
                value["tier_bytes", tier],
                value["tier_budget_bytes", tier],
                value["tier_adapters", tier],
                value["tier_evictions_total", tier],
            )
            for tier in ("host", "device")
        )
        return EngineStats(
            base_model=self.base_model,
            waiting=value["waiting", None],
            running=value["running", None],
            kv_places=value["kv_places", None],
            max_kv_places=value["max_kv_places", None],
            base_bytes=value["base_bytes", None],
            requests={outcome: value["requests_total", outcome] for outcome in get_args(Outcome)},
            prompt_tokens=value["prompt_tokens_total", None],
            completion_tokens=value["completion_tokens_total", None],
            tokens_per_s=rate,
            prefills=value["prefill_seconds_count", None],
            steps=value["step_seconds_count", None],
            splits=value["splits_total", None],
            host=host,
            device=device,
            host_hit_rate=_share(found["host"], found["disk"]),
            device_hit_rate=_share(found["device"], found["host"] + found["disk"]),
            queue_s=spreads[0],
            first_token_s=spreads[1],
            total_s=spreads[2],
        )

    def text(self) -> str:
        """This engine's metrics in Prometheus' text format; ``exposition`` gives those of several."""
        return exposition([self])

    def _came(self, tokens: int) -> None:
        with self._lock:
            self._rate.add(tokens, self._clock())

    def _observe(self, histogram: Histogram, recent: deque[float], seconds: float) -> None:
        histogram.observe(seconds)
        with self._lock:
            recent.append(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, ("base_model", *labels), registry=self.registry)

    def _counted(self, name: str, text: str) -> Counter:
        return self._counter(name, text).labels(self.base_model)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        whole = Histogram(f"{_PREFIX}_{name}", text, ("base_model",), buckets=buckets, registry=self.registry)
        return whole.labels(self.base_model)


def exposition(engines: Iterable[EngineMetrics]) -> str:
    """The metrics of several engines as one page in Prometheus' text format (version 0.0.4).

    Each metric is described once, as the format demands. Engines of the same base model count as one: their series are
    added up.
    """
    return generate_latest(_Sum(tuple(engines))).decode()


@dataclass(frozen=True, slots=True)
class _Sum:
    """A collector that adds up the engines' series."""

    engines: tuple[EngineMetrics, ...]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for engine in self.engines:
            for family in engine.registry.collect():
                families.setdefault(family.name, family)
                own = sums.setdefault(family.name, {})
                for sample in family.samples:
                    key = (sample.name, tuple(sample.labels.items()))
                    own[key] = own.get(key, 0.0) + sample.value
        for family in families.values():
            whole = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in sums[family.name].items():
                if not name.endswith("_created"):  # moments, which make no sum, and half of the page
                    whole.add_sample(name, dict(labels), value)
            yield whole


@dataclass(frozen=True, slots=True)
class _StateCollector:
    """What the engine holds, asked once for all gauges so that they belong to one moment."""

    base_model: str
    state: Callable[[], EngineState]

    def collect(self) -> Iterator[Metric]:
        now = self.state()
        for name, value, text in (
            ("waiting", now.waiting, "Requests that wait."),
            ("running", now.running, "Rows that decode together."),
            ("kv_places", now.kv_places, "Places of the key-value cache in use, rows times width."),
            ("max_kv_places", now.max_kv_places, "Places that the key-value cache may have."),
            ("base_bytes", now.base_bytes, "Memory of the base model's weights."),
        ):
            gauge = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=("base_model",))
            gauge.add_metric((self.base_model,), value)
            yield gauge
        tiers = {"device": now.device, "host": now.host}
        for kind, name, field_name, text in (
            (GaugeMetricFamily, "tier_bytes", "held_bytes", "Bytes of adapters held."),
            (GaugeMetricFamily, "tier_budget_bytes", "budget_bytes", "Bytes of adapters that may be held."),
            (GaugeMetricFamily, "tier_adapters", "adapters", "Adapters held."),
            (CounterMetricFamily, "tier_evictions", "evictions", "Adapters put out to make room."),
        ):
            family = kind(f"{_PREFIX}_{name}", text, labels=("base_model", "tier"))
            for tier, held in tiers.items():
                family.add_metric((self.base_model, tier), getattr(held, field_name))
            yield family


def _while_there(state: Callable[[], EngineState]) -> Callable[[], EngineState]:
    """A method's object is not kept: whoever reads an engine's metrics must not hold its model in memory."""
    if not isinstance(state, MethodType):
        return state
    method: WeakMethod[Any] = WeakMethod(state)

    def now() -> EngineState:
        found = method()
        return EngineState() if found is None else found()

    return now


class _Rate:
    """Tokens of the last minute, a bucket a second. Not thread-safe."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._seconds: deque[list[int]] = deque(maxlen=_MINUTE)

    def add(self, tokens: int, now: float) -> None:
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1][1] += tokens
        else:
            self._seconds.append([second, tokens])

    def per_second(self, now: float) -> float:
        """Over the last minute, or over the engine's life where that is shorter."""
        tokens = sum(tokens for second, tokens in self._seconds if second > now - _MINUTE)
        return tokens / min(max(now - self._since, 1.0), _MINUTE)


def _share(hits: int, misses: int) -> float | None:
    return hits / (hits + misses) if hits + misses else None


def _spread(seconds: Sequence[float]) -> Spread | None:
    if not seconds:
        return None
    import numpy as np

    p50, p95 = np.quantile(seconds, (0.5, 0.95)).tolist()
    return Spread(p50, p95)
