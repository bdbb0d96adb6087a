"""Figures of the server for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms in a registry of their own, so that two servers in a process do not share them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "ecore_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "ecore_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.waiting = Gauge("ecore_waiting_requests", "Requests in the queue.", registry=registry)
        self.batch_size = Histogram(
            "ecore_batch_size", "Requests answered together.", buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "ecore_batch_seconds", "Seconds that a batch took.", buckets=_SECONDS, registry=registry
        )
        self.words = Counter("ecore_words", "Words answered.", registry=registry)
        self.cancelled = Counter("ecore_cancelled", "Requests whose client left.", registry=registry)
