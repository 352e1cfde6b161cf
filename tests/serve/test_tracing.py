"""Spans, as a collector on loopback receives them from the real server."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import msgspec
import pytest
from grpc_calls import TEXTS, request
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serve_process import served
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from kdexport.serve.http import ClientGone, Refused, Request
from kdexport.serve.tracing import Tracer

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HOUR_MS = "3600000"


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP/HTTP endpoint and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", received
        finally:
            server.shutdown()
            thread.join()


def post(url: str, content: object, **headers: str) -> None:
    asked = urllib.request.Request(
        url, msgspec.json.encode(content), {"content-type": "application/json"} | headers, method="POST"
    )
    with urllib.request.urlopen(asked) as response:
        response.read()


@pytest.fixture(scope="module")
def spans(finished) -> dict[str, list[tuple[Span, dict[str, object]]]]:
    """Name → the spans of one server, with their attributes; all of them come when it ends."""
    environment = {"OTEL_BSP_SCHEDULE_DELAY": HOUR_MS, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    oip = {"inputs": [{"name": "text", "shape": [3], "datatype": "BYTES", "data": TEXTS}]}
    with collector() as (url, received):
        with served(
            f"news={finished}", "--tracing", "--grpc-port", 0, OTEL_EXPORTER_OTLP_ENDPOINT=url, **environment
        ) as server:
            post(f"{server.url}/v2/models/news/infer", oip, traceparent=f"00-{TRACE}-{CALLER}-01")
            post(f"{server.url}/models/news", {"inputs": TEXTS[0]}, traceparent=f"00-{TRACE}-{CALLER}-00")
            post(f"{server.url}/", {"inputs": TEXTS[0]})
            with suppress(urllib.error.HTTPError):
                post(f"{server.url}/v2/models/a-secret/infer", oip)
            with grpc.insecure_channel(re.search(r"gRPC on (\S+)", "".join(server.log))[1]) as channel:
                GRPCInferenceServiceStub(channel).ModelInfer(
                    request(TEXTS), metadata=[("traceparent", f"00-{TRACE}-{CALLER}-01")]
                )
            assert received == []
    found: dict[str, list[tuple[Span, dict[str, object]]]] = {}
    for message in received:
        for resource in message.resource_spans:
            facts = attributes(resource.resource)
            assert (facts["service.name"], facts["deployment.environment"]) == ("kdexport", "test")
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                found.setdefault(span.name, []).append((span, attributes(span)))
    return found


def attributes(of) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("POST /v2/models/news/infer", "oip"), ("POST /inference.GRPCInferenceService/ModelInfer", "grpc")],
)
def test_a_span_is_the_callers_child_and_says_where_the_time_went(spans, name, protocol):
    ((span, facts),) = spans[name]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, CALLER)
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert (facts["kdexport.protocol"], facts["kdexport.model"], facts["kdexport.rows"]) == (protocol, "news", 3)
    took_ms = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
    assert 0 < facts["kdexport.run_ms"] < took_ms
    assert 0 <= facts["kdexport.queue_ms"] < took_ms


def test_without_a_caller_a_trace_begins_here(spans):
    ((span, _),) = spans["POST /"]
    assert span.parent_span_id == b""
    assert span.trace_id.hex() != TRACE


def test_what_the_caller_does_not_record_is_not_recorded_here(spans):
    assert "POST /models/news" not in spans


def test_a_refused_request_is_no_fault_of_ours_and_names_no_path(spans):
    ((span, facts),) = spans["POST"]
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert facts["error.type"] == "404"


def test_no_text_is_in_a_span(spans):
    assert not any(word in str(spans) for word in ("striker", "warned", "Traceback"))


@pytest.fixture
def memory(monkeypatch) -> InMemorySpanExporter:
    """Where the program around us has its spans go."""
    found = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return found


@pytest.mark.parametrize(
    ("error", "kind", "ours"),
    [
        (Refused(429, "too much"), "429", False),
        (Refused(503, "not yet"), "503", True),
        (ClientGone(), "cancelled", False),
        (ZeroDivisionError("a secret"), "ZeroDivisionError", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_surrounding_programs_provider_is_used_and_left_alone(memory, error, kind, ours):
    tracer = Tracer(True)
    with pytest.raises(type(error)):
        with tracer.span(Request({"type": "http", "method": "POST", "path": "/", "headers": []}, None)):
            raise error
    tracer.close()
    with tracer.span(Request({"type": "http", "method": "GET", "path": "/", "headers": []}, None)):
        pass
    failed, after = memory.get_finished_spans()
    assert failed.attributes["error.type"] == kind
    assert (failed.status.status_code is trace.StatusCode.ERROR) == ours
    assert not failed.events
    assert "secret" not in failed.to_json()
    assert after.name == "GET"


def test_without_a_collector_requests_are_answered_and_the_end_comes(finished):
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with served(f"news={finished}", "--tracing", **environment) as server:
        post(f"{server.url}/", {"inputs": TEXTS})
        began = time.monotonic()
    assert time.monotonic() - began < 5


def test_nothing_is_loaded_when_it_is_off():
    probe = (
        "import sys, kdexport.serve.server; from kdexport.serve.tracing import Tracer; t = Tracer(False); t.close()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"])
def test_without_the_extra_one_line_says_which(missing):
    probe = f"import sys; sys.modules[{missing!r}] = None; from kdexport.serve.tracing import Tracer; Tracer(True)"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "pip install 'kdexport[otel]'" in found.stderr.splitlines()[-1]
