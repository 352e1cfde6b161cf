"""Optional spans for OpenTelemetry: one a request, a child of the caller's when it sends `traceparent`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from kdexport.errors import MissingPackage
from kdexport.serve.http import Request

_NOTHING: AbstractContextManager[None] = nullcontext()


class Tracer:
    """Spans to where the `OTEL_…` environment variables say, or nothing at all.

    Raises:
        MissingPackage: spans are wanted and `kdexport[otel]` is not installed.
    """

    def __init__(self, wanted: bool) -> None:
        self._tracer: Any = None
        if not wanted:
            return
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise MissingPackage("opentelemetry-exporter-otlp-proto-http", "otel") from None
        if not isinstance(trace.get_tracer_provider(), TracerProvider):  # a program around us may have set one
            provider = TracerProvider(resource=Resource.create({"service.name": "kdexport"}))
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            trace.set_tracer_provider(provider)
        self._tracer = trace.get_tracer("kdexport.serve")

    def span(self, request: Request) -> AbstractContextManager[None]:
        """Around a request's answer; it says which model, how many rows, and where the time went."""
        return _NOTHING if self._tracer is None else self._span(request)

    @contextmanager
    def _span(self, request: Request) -> Iterator[None]:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        caller = extract({key.decode("latin-1"): value.decode("latin-1") for key, value in request.scope["headers"]})
        with self._tracer.start_as_current_span(
            f"{request.method} {request.path}", context=caller, kind=SpanKind.SERVER
        ) as span:
            try:
                yield
            finally:
                span.set_attributes(
                    {
                        "http.request.method": request.method,
                        "url.path": request.path,
                        "kdexport.model": request.model,
                        "kdexport.rows": request.rows,
                        "kdexport.queue_ms": 1e3 * request.queued_s,
                        "kdexport.run_ms": 1e3 * request.run_s,
                    }
                )
