"""What an engine tells of itself is read by Prometheus' own parser, and by people; its log names no text."""

from __future__ import annotations

import json
import logging
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_hub_sdk.engine.logs import log_crash, log_request, log_split
from lora_hub_sdk.engine.metrics import EngineMetrics, EngineState, Spread, TierState, exposition
from lora_hub_sdk.types import Completion, Route, Timing, Trace, Usage
from tests.support import bare_adapter, route_of

TIMING = Timing(queue_s=0.1, load_s=0.05, prefill_s=0.2, decode_s=0.3, first_token_s=0.3, total_s=0.6)
STATE = EngineState(
    waiting=7,
    running=3,
    kv_places=600,
    max_kv_places=65536,
    base_bytes=269_000_000,
    host=TierState(held_bytes=1000, budget_bytes=4000, adapters=2, evictions=5),
    device=TierState(held_bytes=300, budget_bytes=900, adapters=1, evictions=9),
)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.5

    def __call__(self) -> float:
        return self.now


def read(page: str) -> dict[tuple[str, ...], float]:
    """Each series of a page by its name and the values of its labels, ``base_model`` first."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_prometheus_reads_what_happened() -> None:
    metrics = EngineMetrics("base", lambda: STATE)
    metrics.request_done("stop", TIMING, Usage(10, 20))
    metrics.request_done("cancelled", TIMING, Usage(10, 4))
    metrics.request_done("deadline", Timing(queue_s=2.0, total_s=2.0))
    metrics.refused()
    metrics.found("disk", 2)
    metrics.found("device")
    metrics.prefill(2, 20, 0.2)
    metrics.step(2, 0.03)
    metrics.step(1, 0.01)
    metrics.split(8)
    found = read(metrics.text())
    expected = {
        ("requests_total", "stop"): 1,
        ("requests_total", "cancelled"): 1,
        ("requests_total", "deadline"): 1,
        ("requests_total", "busy"): 1,
        ("requests_total", "error"): 0,
        ("prompt_tokens_total",): 20,
        ("completion_tokens_total",): 24,
        ("prefill_tokens_total",): 20,
        ("adapters_found_total", "disk"): 2,
        ("adapters_found_total", "host"): 0,
        ("adapters_found_total", "device"): 1,
        ("splits_total",): 1,
        ("split_rows_total",): 8,
        ("queue_seconds_count",): 3,
        ("first_token_seconds_count",): 2,
        ("request_seconds_count",): 1,
        ("request_seconds_sum",): 0.6,
        ("request_seconds_bucket", "0.5"): 0,
        ("request_seconds_bucket", "1.0"): 1,
        ("prefill_seconds_count",): 1,
        ("step_seconds_count",): 2,
        ("step_rows_sum",): 3,
        ("waiting",): 7,
        ("running",): 3,
        ("kv_places",): 600,
        ("max_kv_places",): 65536,
        ("base_bytes",): 269_000_000,
        ("tier_bytes", "host"): 1000,
        ("tier_budget_bytes", "host"): 4000,
        ("tier_adapters", "device"): 1,
        ("tier_evictions_total", "device"): 9,
    }
    named = {(f"lora_hub_engine_{name}", "base", *labels): value for (name, *labels), value in expected.items()}
    assert {key: found[key] for key in named} == named


def test_every_series_is_there_before_anything_happened() -> None:
    quiet = EngineMetrics("base")
    busy = EngineMetrics("base")
    busy.request_done("error", TIMING, Usage(1, 1))
    busy.found("host")
    assert read(quiet.text()).keys() == read(busy.text()).keys()
    assert not any(value for value in read(quiet.text()).values())


def test_names_of_models_may_be_any_text() -> None:
    name = 'C:\\models\\"quoted"\nésprit'
    metrics = EngineMetrics(name)
    metrics.found("host", 3)
    assert read(metrics.text())["lora_hub_engine_adapters_found_total", name, "host"] == 3


def test_several_engines_share_a_page() -> None:
    engines = [EngineMetrics("one"), EngineMetrics("two", lambda: STATE), EngineMetrics("two", lambda: STATE)]
    for place, metrics in enumerate(engines, start=1):
        metrics.found("host", place)
        metrics.step(place, 0.01)
    page = exposition(engines)
    described = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len(set(described))
    series = [line.rsplit(" ", 1)[0] for line in page.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))
    found = read(page)
    assert found["lora_hub_engine_adapters_found_total", "one", "host"] == 1
    assert found["lora_hub_engine_adapters_found_total", "two", "host"] == 5
    assert found["lora_hub_engine_step_rows_bucket", "two", "2.0"] == 1
    assert found["lora_hub_engine_step_rows_bucket", "two", "4.0"] == 2
    assert found["lora_hub_engine_waiting", "two"] == 14
    assert read(exposition([])) == {}


def test_nothing_is_lost_between_threads() -> None:
    metrics = EngineMetrics("base")
    together = threading.Barrier(8)

    def work() -> None:
        together.wait()
        for _ in range(300):
            metrics.request_done("length", TIMING, Usage(2, 3))
            metrics.step(4, 0.01)
            metrics.refused()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        metrics.stats()  # while the others write
    for thread in threads:
        thread.join()
    stats = metrics.stats()
    assert stats.requests["length"] == stats.requests["busy"] == stats.steps == 2400
    assert (stats.prompt_tokens, stats.completion_tokens) == (4800, 7200)


def test_the_snapshot_tells_what_is_held_and_what_was_found() -> None:
    metrics = EngineMetrics("base", lambda: STATE)
    empty = metrics.stats()
    assert (empty.host_hit_rate, empty.device_hit_rate, empty.queue_s, empty.total_s) == (None, None, None, None)
    assert empty.tokens_per_s == 0.0
    metrics.found("device", 6)
    metrics.found("host", 3)
    metrics.found("disk")
    stats = metrics.stats()
    assert (stats.device_hit_rate, stats.host_hit_rate) == (0.6, 0.75)
    assert (stats.waiting, stats.running, stats.kv_places, stats.max_kv_places) == (7, 3, 600, 65536)
    assert stats.base_bytes == 269_000_000
    assert (stats.host, stats.device) == (STATE.host, STATE.device)
    assert json.loads(json.dumps(stats.as_dict()))["host"]["held_bytes"] == 1000


def test_spreads_are_those_of_the_last_thousand_complete_answers() -> None:
    metrics = EngineMetrics("base")
    for total in (999.0, *range(1, 1001)):
        metrics.request_done("stop", Timing(queue_s=0.5, first_token_s=2.0, total_s=float(total)), Usage(1, 1))
    metrics.request_done("cancelled", Timing(queue_s=0.5, total_s=10_000.0), Usage(1, 0))
    stats = metrics.stats()
    assert stats.total_s is not None
    assert (stats.total_s.p50, stats.total_s.p95) == pytest.approx((500.5, 950.05))
    assert (stats.queue_s, stats.first_token_s) == (Spread(0.5, 0.5), Spread(2.0, 2.0))


def test_the_rate_is_that_of_the_last_minute() -> None:
    clock = Clock()
    metrics = EngineMetrics("base", clock=clock)
    metrics.prefill(2, 50, 0.1)
    clock.now += 9.5
    metrics.step(8, 0.1)
    clock.now += 0.5
    assert metrics.stats().tokens_per_s == pytest.approx(1.0), "ten tokens in the ten seconds since it was opened"
    clock.now += 30
    assert metrics.stats().tokens_per_s == pytest.approx(0.25)
    clock.now += 25
    assert metrics.stats().tokens_per_s == pytest.approx(8 / 60), "the first two are older than a minute"
    clock.now += 3600
    assert metrics.stats().tokens_per_s == 0.0
    for _ in range(200):
        clock.now += 1
        metrics.step(3, 0.1)
    assert metrics.stats().tokens_per_s == pytest.approx(3.0)


def test_a_request_that_ended_is_one_record_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    route = route_of("mixture", (bare_adapter("maths"), 0.5), (bare_adapter("french"), 0.5))
    with caplog.at_level(logging.INFO, "lora_hub_sdk.engine"):
        log_request(
            4, "stop", base_model="base", route=route, tiers=("host", "disk"), timing=TIMING, usage=Usage(10, 20)
        )
        log_request(5, "error", base_model="base", route=route, error=ValueError("my secret prompt"))
    done, failed = (vars(record) for record in caplog.records)
    assert (done["levelname"], done["name"], done["event"]) == ("INFO", "lora_hub_sdk.engine", "request")
    assert (done["request_id"], done["outcome"], done["base_model"]) == (4, "stop", "base")
    assert (done["strategy"], done["timing"], done["error"]) == ("mixture", TIMING.as_dict(), None)
    assert done["tokens"]["total_tokens"] == 30
    assert done["adapters"] == [
        {"name": "maths", "weight": 0.5, "score": None, "tier": "host"},
        {"name": "french", "weight": 0.5, "score": None, "tier": "disk"},
    ]
    assert (failed["error"], failed["timing"], failed["tokens"]) == ("ValueError", None, None)
    assert [adapter["tier"] for adapter in failed["adapters"]] == [None, None]
    assert "secret" not in repr(failed)


def test_splits_are_warnings_and_a_crash_is_an_error_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = MemoryError("out of memory")
    log_split(8, base_model="base", error=error)
    log_crash(error, base_model="base")
    split, crash = caplog.records
    assert (split.levelname, vars(split)["event"], vars(split)["rows"]) == ("WARNING", "split", 8)
    assert (crash.levelname, vars(crash)["event"], vars(crash)["error"]) == ("ERROR", "crash", "MemoryError")
    assert "out of memory" in caplog.text


def test_completions_that_differ_in_time_only_are_equal() -> None:
    def completion(text: str, trace: Trace) -> Completion:
        return Completion(text, "stop", Usage(1, 1), trace)

    route = Route("base", "outputs")
    timed = Trace(route, 1, timing=TIMING, tiers=("disk",))
    assert completion("x", timed) == completion("x", Trace(route, 1))
    assert completion("x", timed) != completion("y", timed)
