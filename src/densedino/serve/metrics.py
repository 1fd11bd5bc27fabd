"""Owns what the service counts, and its text for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from densedino.errors import require

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one server; several in a process do not mix."""

    def __init__(self) -> None:
        prometheus: Any = require("prometheus_client", extra="serve", purpose="densedino serve")
        self._generate = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST
        self._gauge = prometheus.Gauge
        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "densedino_requests", "Answered requests.", ["route", "status"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "densedino_request_seconds", "Time to the whole answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._batches = prometheus.Histogram(
            "densedino_batch_images", "Images per run of the model.", buckets=_IMAGES, registry=registry
        )
        self._model = prometheus.Counter("densedino_model_seconds", "Time that the model ran.", registry=registry)
        self._replaced = prometheus.Counter(
            "densedino_decoders_replaced", "Decoding processes that hung, died or ran out of memory.", registry=registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one answer. `route` is a template, or requests could make up any number of series."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def ran(self, images: int, seconds: float) -> None:
        """Count one run of the model."""
        self._batches.observe(images)
        self._model.inc(seconds)

    def decoder_replaced(self) -> None:
        """Count one decoding process that came to an end."""
        self._replaced.inc()

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Show a number that is read whenever somebody asks."""
        self._gauge(f"densedino_{name}", what, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """The exposition format, of `content_type`."""
        return bytes(self._generate(self._registry))
