"""Optional OpenTelemetry spans: one per request, a child of the caller's by `traceparent`.

A span has the model, rows and times; never a text, a key or a traceback.
"""

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from kdexport.errors import MissingPackage
from kdexport.serve.http import ClientGone, Refused, Request

_NOTHING: AbstractContextManager[None] = nullcontext()


class Tracer:
    """Spans, exported as the `OTEL_…` environment variables say; none unless wanted."""

    def __init__(self, wanted: bool) -> None:
        self._own: Any = None
        self._tracer: Any = None
        if not wanted:
            return
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError:
            raise MissingPackage("opentelemetry-sdk", "otel") from None
        provider = trace.get_tracer_provider()
        if not isinstance(provider, TracerProvider):  # else the host program has configured it
            provider = self._own = _provider()
        self._tracer = provider.get_tracer("kdexport.serve")
        self._extract = propagate.extract
        self._server, self._error = trace.SpanKind.SERVER, trace.StatusCode.ERROR

    def span(self, request: Request) -> AbstractContextManager[None]:
        """Return a request's span, as a context."""
        return _NOTHING if self._tracer is None else self._span(request)

    def close(self) -> None:
        """Flush spans, within the exporter's timeout."""
        if self._own is not None:
            self._own.shutdown()

    @contextmanager
    def _span(self, request: Request) -> Iterator[None]:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in request.scope["headers"]}
        with self._tracer.start_as_current_span(
            request.method, context=self._extract(headers), kind=self._server,
            # A client's error is not ours, and a traceback may quote the request.
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            try:
                yield
            except Refused as refused:
                span.set_attribute("error.type", str(refused.status))
                if refused.status >= 500:
                    span.set_status(self._error)
                raise
            except (ClientGone, asyncio.CancelledError):
                span.set_attribute("error.type", "cancelled")
                raise
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._error)
                raise
            finally:
                if request.model or request.scope["type"] == "grpc":  # else the path may be anything
                    span.update_name(f"{request.method} {request.path}")
                attributes = {
                    "http.request.method": request.method, "url.path": request.path[:256],
                    "kdexport.protocol": request.protocol, "kdexport.model": request.model,
                    "kdexport.rows": request.rows, "kdexport.queue_ms": 1e3 * request.queued_s,
                    "kdexport.run_ms": 1e3 * request.run_s,
                }  # fmt: skip
                span.set_attributes({key: value for key, value in attributes.items() if value})


def _provider() -> Any:
    """Batched export over OTLP; the service's default name is kdexport."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingPackage("opentelemetry-exporter-otlp-proto-http", "otel") from None
    named = Resource({"service.name": "kdexport"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create(named.attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
