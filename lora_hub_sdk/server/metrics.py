"""What the server tells of itself beside its engines: requests by route and status, their time, and what runs."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counts requests. Routes are those of the app, never what a client typed. Thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            "lora_hub_http_request_seconds",
            "Time of a request, its stream included.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._requests = Counter(
            "lora_hub_http_requests",
            "Requests that ended, by status; 499: the client went away.",
            ("route", "status"),
            registry=self._registry,
        )
        self.running: Final = Gauge("lora_hub_http_running", "Requests that run now.", registry=self._registry)

    def ended(self, route: str, status: int, seconds: float) -> None:
        """A request has its answer, or nobody waits for it any more."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def page(self) -> str:
        """Prometheus' text format."""
        return generate_latest(self._registry).decode()
