"""What Prometheus reads: queue, batch sizes, latencies, compilations."""

from typing import Any

import jax

from .programs import COMPILED
from .queueing import AbstractEngine

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The counters of one server, in a registry of their own.

    `observe` is what an `Engine` is given; `watch` adds what is read from one when asked.

    >>> metrics = Metrics()
    >>> metrics.observe("images", 1)
    >>> "eqxldm_images_total 1.0" in metrics.text()
    True
    """

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        there: dict[str, Any] = dict(registry=self.registry)
        self.requests = Counter(
            "eqxldm_requests", "Requests answered, by status.", ["status"], **there
        )
        self.latency = Histogram(
            "eqxldm_request_seconds",
            "From a request to its last image or text.",
            buckets=SECONDS,
            **there,
        )
        self._rows = Histogram(
            "eqxldm_network_rows", "Network rows that a call was asked for.",
            buckets=(1, 2, 4, 8, 16, 32, 64), **there,
        )  # fmt: skip
        self._sizes = Counter(
            "eqxldm_network_calls", "Network calls, by the size that was compiled.", ["size"],
            **there,
        )  # fmt: skip
        self._steps = Histogram(
            "eqxldm_step_seconds", "Between two network calls.", buckets=SECONDS, **there
        )
        self._counters = {
            "images": Counter("eqxldm_images", "Images delivered.", **there),
            "texts": Counter("eqxldm_texts", "Texts delivered.", **there),
            "cancelled": Counter(
                "eqxldm_cancelled", "Images or texts that were given up.", **there
            ),
        }
        self._compiled = Counter(
            "eqxldm_compilations", "Programs compiled since the start.", **there
        )
        self._gauge = lambda name, text: Gauge(name, text, **there)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration_secs, **kwargs):
        if event == COMPILED:
            self._compiled.inc()

    def close(self) -> None:
        """Listens no longer."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def watch(self, engine: AbstractEngine) -> None:
        """Shows an engine's queue and slots."""
        self._gauge("eqxldm_queue", "Images or texts that wait.").set_function(
            lambda: engine.waiting
        )
        self._gauge("eqxldm_active", "Images or texts under way.").set_function(
            lambda: engine.active
        )
        self._gauge("eqxldm_ready", "1 when requests are taken.").set_function(
            lambda: float(engine.ready.is_set())
        )

    def observe(self, name: str, value: float) -> None:
        """Counts what an engine tells."""
        if name == "rows":
            self._rows.observe(value)
        elif name == "size":
            self._sizes.labels(str(int(value))).inc()
        elif name == "step_seconds":
            self._steps.observe(value)
        else:
            self._counters[name].inc(value)

    def text(self) -> str:
        """All of them, in Prometheus's form."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode()
