"""Prometheus metrics of a server.

kdexport_requests_total{model,protocol,code}     requests answered
kdexport_request_seconds{model,protocol}         from the first byte read to the answer
kdexport_queue_seconds{model}                    from taken in to its first batch begun
kdexport_inference_seconds{model}                from its first batch begun to its last one done
kdexport_batch_rows, kdexport_batch_seconds      of the batches that ran
kdexport_rows_total, kdexport_tokens_total       rows and tokens that ran
kdexport_generated_tokens_total{model}           tokens that language models wrote
kdexport_first_token_seconds{model}              from the request read to the first of them
kdexport_waiting_rows, kdexport_waiting_tokens   what waits now
kdexport_waiting_prompts                         prompts that wait for a language model now
kdexport_tokens_per_second                       what the threads are thought to do
kdexport_ready                                   1 when `ready` says so
kdexport_model_info{model,version,variant}       1 for each model in service
kdexport_model_loads_total{model,outcome}        loads and reloads: ok, refused
kdexport_log_dropped_lines_total                 access-log lines that nobody read in time, or that a disk refused
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

from kdexport.serve.http import Request

# Seconds: 0.1 ms to 100 ms in steps of about 1.6, then what is slow in any case.
BUCKETS = (
    0.0001, 0.00016, 0.00025, 0.0004, 0.00063, 0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025, 0.04, 0.063,
    0.1, 0.25, 1.0, 5.0, 30.0,
)  # fmt: skip


class Metrics:
    """One server's registry."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry, buckets=BUCKETS)
        self._requests = counter("kdexport_requests", "Requests", ["model", "protocol", "code"])
        self._generated = counter("kdexport_generated_tokens", "Tokens that were written", ["model"])
        self._first = histogram("kdexport_first_token_seconds", "Request to first token", ["model"])
        self._batch_rows = histogram("kdexport_batch_rows", "Rows of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
        self._batch_seconds = histogram("kdexport_batch_seconds", "A batch's run")
        self._rows = counter("kdexport_rows", "Rows that ran")
        self._tokens = counter("kdexport_tokens", "Tokens that ran, as estimated")
        self.loads = counter("kdexport_model_loads", "Loads and reloads", ["model", "outcome"])
        self.log_dropped = counter("kdexport_log_dropped_lines", "Lines that were not logged")
        # Told apart by nothing: these were not read.
        self.refused = self._requests.labels("", "", "429")
        # Looking a child up by its labels takes as long as counting; requests repeat theirs.
        self._count = cache(self._requests.labels)
        self._time = cache(histogram("kdexport_request_seconds", "Request to answer", ["model", "protocol"]).labels)
        self._wait = cache(histogram("kdexport_queue_seconds", "Waiting", ["model"]).labels)
        self._run = cache(histogram("kdexport_inference_seconds", "Running", ["model"]).labels)

    def request(self, request: Request, code: int, seconds: float) -> None:
        """Count one answered request."""
        self._count(request.model, request.protocol, str(code)).inc()
        if request.tokens:
            self._generated.labels(request.model).inc(request.tokens)
            self._first.labels(request.model).observe(request.first_s)
        if code == 200 and request.rows:
            self._time(request.model, request.protocol).observe(seconds)
            self._wait(request.model).observe(request.queued_s)
            self._run(request.model).observe(request.run_s)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """Count one batch."""
        self._batch_rows.observe(rows)
        self._batch_seconds.observe(seconds)
        self._rows.inc(rows)
        self._tokens.inc(tokens)

    def watch(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when it is scraped."""
        Gauge(name, help, registry=self.registry).set_function(read)

    def watch_models(self, read: Callable[[], list[tuple[str, str, str]]]) -> None:
        """Add `kdexport_model_info`, of (model, version, variant) in service when it is scraped."""
        self.registry.register(_ModelInfo(read))

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return bytes(generate_latest(self.registry))


class _ModelInfo:
    def __init__(self, read: Callable[[], list[tuple[str, str, str]]]) -> None:
        self._read = read

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily("kdexport_model_info", "In service", labels=["model", "version", "variant"])
        for labels in self._read():
            family.add_metric(list(labels), 1)
        return [family]
