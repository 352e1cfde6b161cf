"""Connections that are slow, idle, greedy or ambiguous: bounded in time and number, and never out of order."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from serve_process import served
from wire import GOOD, Wire, ask, assert_refused, is_well, request

# Settings that have no flag, small, so that their ends are seen soon.
READ_TIMEOUT, KEEP_ALIVE, MAX_CONNECTIONS = 0.5, 1, 20
PROGRAM = f"""
import sys
from kdexport.serve.server import serve
from kdexport.serve.settings import Settings
sys.exit(serve(sys.argv[1:2], Settings(
    port=0, admin_port=0, access_log="off",
    read_timeout={READ_TIMEOUT}, keep_alive={KEEP_ALIVE}, max_connections={MAX_CONNECTIONS},
)))
"""
PING = request("/ping")


@pytest.fixture(scope="module")
def server(finished):
    with served(f"news={finished}", program=("-c", PROGRAM)) as found:
        yield found
    assert not any("Traceback" in line or "Warning" in line for line in found.log)


@pytest.fixture(autouse=True)
def unharmed(request):
    yield
    if "server" in request.fixturenames:
        assert is_well(request.getfixturevalue("server").url)


@pytest.fixture
def wire(server):
    with Wire(server.url, timeout=5.0) as found:
        yield found


def post(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: localhost", *headers, b"", body])


def drip(wire: Wire, byte: bytes) -> float:
    """Send a byte every so often until the server ends it; seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < 4:
        try:
            wire.socket.sendall(byte)
        except OSError:
            break
        time.sleep(0.05)
    return time.monotonic() - began


# --- slow and idle


def test_a_connection_that_never_sends_is_closed(wire):
    assert READ_TIMEOUT * 0.8 < wire.closed_after() < READ_TIMEOUT + 1


@pytest.mark.parametrize("start", [b"G", b"GET /ping HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nContent-Length: 5\r\n"])
def test_a_head_that_trickles_is_cut_off(wire, start):
    assert drip(wire.send(start), b"a") < READ_TIMEOUT + 1
    assert_refused(wire.answer(), 408, 400)


def test_a_head_that_stops_is_cut_off_with_408(wire):
    assert_refused(wire.send(b"GET /ping HTTP/1.1\r\nHost: te").answer(), 408)
    assert wire.answer() is None


@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_body_that_stops_is_cut_off_with_408(wire, framing, begun):
    began = time.monotonic()
    wire.send(post(framing, body=b"5\r\n" if begun else b""))
    assert_refused(wire.answer(), 408)
    assert time.monotonic() - began < READ_TIMEOUT + 1
    assert wire.answer() is None


def test_a_body_that_trickles_is_cut_off_with_408(wire):
    assert drip(wire.send(post(b"Content-Length: 1000")), b" ") < READ_TIMEOUT + 1
    assert_refused(wire.answer(), 408)


def test_a_connection_without_a_request_is_kept_for_a_while(wire):
    assert wire.send(PING).answer().status == 200
    time.sleep(KEEP_ALIVE * 0.6)
    assert wire.send(PING).answer().status == 200
    assert KEEP_ALIVE * 0.8 < wire.closed_after() < KEEP_ALIVE + 1


@pytest.mark.parametrize(
    "first",
    [PING, request("/nowhere", b"", b"X: y").replace(b"Length: 0", b"Length: 1000")],
    ids=["between requests", "a body that nobody waits for"],
)
def test_stray_bytes_do_not_keep_a_connection(wire, first):
    wire.send(first).answer()
    assert drip(wire, b"\r\n") < max(READ_TIMEOUT, KEEP_ALIVE) + 1


def test_a_byte_and_then_silence_does_not_keep_a_connection(wire):
    wire.send(PING).answer()
    assert wire.send(b"\r\n").closed_after() < max(READ_TIMEOUT, KEEP_ALIVE) + 1


def test_a_body_that_nobody_waited_for_leaves_the_connection_in_order(wire):
    wire.send(request("/nowhere", GOOD)[:-5])
    assert_refused(wire.answer(), 404)
    wire.send(GOOD[-5:], PING)
    assert wire.answer().json["ready"] is True
    assert KEEP_ALIVE * 0.8 < wire.closed_after() < KEEP_ALIVE + 1


def test_a_client_that_reads_nothing_is_cut_off(server):
    began = time.monotonic()
    with Wire(server.url, timeout=0.2, receive_buffer=4096) as wire:
        while time.monotonic() - began < 8:
            try:
                wire.socket.sendall(request("/openapi.json"))
                time.sleep(0.01)
            except TimeoutError:
                continue  # it is not read from any more
            except OSError:
                break
        assert time.monotonic() - began < 6


def test_slow_clients_do_not_slow_others(server):
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS - 2):
            stack.enter_context(Wire(server.url)).send(post(b"Content-Length: 100", body=b"{"))
        began = time.monotonic()
        assert is_well(server.url)
        assert time.monotonic() - began < READ_TIMEOUT


def test_more_connections_than_allowed_are_told(server):
    with ExitStack() as stack:
        inside = [stack.enter_context(Wire(server.url)) for _ in range(MAX_CONNECTIONS)]
        outside = [stack.enter_context(Wire(server.url)) for _ in range(30)]
        for wire in outside:
            answer = wire.answer()
            assert answer.status == 503
            assert list(answer.json) == ["error"]
        assert {wire.send(PING).answer().status for wire in inside} == {200}


# --- heads


@pytest.mark.parametrize(
    "head",
    [
        b"GET /ping HTTP/1.1\r\nX: " + b"a" * 40_000,
        b"GET /ping HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1",
        b"GET /ping HTTP/1.1\r\nX: " + b"a" * 1_000_000,
        b"GET /ping HTTP/1.1\r\n" + b"a" * 50_000 + b": b",
    ],
    ids=["a value", "many", "a path", "a huge value", "a name"],
)
@pytest.mark.parametrize("pieces", [1, 10])
def test_a_head_that_is_too_large_is_refused(wire, head, pieces):
    step = -(-len(head) // pieces)
    wire.send(*(head[i : i + step] for i in range(0, len(head), step)), b"\r\n\r\n", pause=0.01 if pieces > 1 else 0)
    assert_refused(wire.answer(), 431, 400)
    assert wire.answers() == []


def test_a_large_head_that_is_allowed_is_read_and_so_is_a_body_beside_it(wire):
    body = b" " * 200_000 + GOOD
    assert wire.send(request("/", body, b"X: " + b"a" * 30_000)).answer().status == 200


# --- framing: what could be read in two ways is read in none

AMBIGUOUS = {
    "length twice": (b"Content-Length: 5", b"Content-Length: 5"),
    "lengths that differ": (b"Content-Length: 5", b"Content-Length: 50"),
    "a list of lengths": (b"Content-Length: 5, 5",),
    "a negative length": (b"Content-Length: -1",),
    "a length with a sign": (b"Content-Length: +5",),
    "a hexadecimal length": (b"Content-Length: 0x5",),
    "a length beyond 64 bits": (b"Content-Length: 18446744073709551621",),
    "a length of Arabic digits": ("Content-Length: ٥".encode(),),
    "a space before the colon": (b"Content-Length : 5",),
    "length and chunks": (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "chunks and length": (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "chunks twice": (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "chunks and something": (b"Transfer-Encoding: chunked, identity",),
    "something and chunks": (b"Transfer-Encoding: gzip, chunked",),
    "almost chunks": (b"Transfer-Encoding: xchunked",),
    "chunks after a tab": (b"Transfer-Encoding:\x0bchunked",),
    "a folded header": (b"Transfer-Encoding:", b" chunked"),
    "a header with a NUL": (b"Content-Length: 5\x00",),
    "a bare line feed": (b"X: y\nContent-Length: 5",),
    "a bare carriage return": (b"X: y\rContent-Length: 5",),
    "no name": (b": 5",),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_framing_that_is_ambiguous_is_refused_and_what_follows_is_not_read(wire, name):
    wire.send(post(*AMBIGUOUS[name], body=b"0\r\n\r\n" + PING))
    first, *more = wire.answers()
    assert_refused(first, 400)
    assert not more


@pytest.mark.parametrize(
    "body",
    [b"-1\r\n", b"fffffffffffffffff\r\n", b"g\r\n", b"5\r\nhello0\r\n\r\n", b"5 \r\n", b"5\nhello\n0\n\n", b"+5\r\n"],
)
def test_chunks_that_are_none_are_refused(wire, body):
    first, *more = wire.send(post(b"Transfer-Encoding: chunked", body=body + PING)).answers()
    assert_refused(first, 400)
    assert not more


def test_chunks_in_http_1_0_are_refused(wire):
    head = post(b"Transfer-Encoding: chunked", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD))
    assert_refused(wire.send(head.replace(b"HTTP/1.1", b"HTTP/1.0")).answer(), 400)
    assert wire.answer() is None


def test_a_length_that_is_too_small_leaves_a_rest_that_is_no_request(wire):
    first, *more = wire.send(request("/", GOOD).replace(b": %d" % len(GOOD), b": 5")).answers()
    assert_refused(first, 400)
    assert not more


def test_a_length_that_is_too_large_waits_for_its_rest_only_so_long(wire):
    assert_refused(wire.send(request("/", GOOD).replace(b": %d" % len(GOOD), b": 500")).answer(), 408)


def test_a_declared_length_beyond_reason_is_refused_before_a_byte_of_it(wire):
    assert_refused(wire.send(post(b"Content-Length: 9223372036854775807")).answer(), 413)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"SSH-2.0-x\r\n",
        b"BREW / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"\0" * 100,
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http:///ping HTTP/1.1\r\n\r\n",
        b"GET ping HTTP/1.1\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:20]),
)  # fmt: skip
def test_what_is_no_request_for_this_server_is_refused(wire, sent):
    first, *more = wire.send(sent).answers()
    assert_refused(first, 400, 405)
    assert not more


@pytest.mark.parametrize("method", ["TRACE", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"])
@pytest.mark.parametrize("path", ["/", "/predict", "/v2/models/news/infer", "/ping"])
def test_other_methods_are_refused_and_nothing_is_echoed(server, method, path):
    found = ask(server.url, path, None, b"X-Secret: 12345", method=method)
    assert_refused(found, 405)
    assert b"12345" not in found.body
    assert found.headers["allow"]


def test_a_head_request_has_no_body(wire):
    came = wire.send(request("/ping", method="HEAD") + request("/ping", None, b"Connection: close")).rest()
    assert came.count(b"HTTP/1.1 200 OK") == 2
    assert came.count(b"content-length: 26") == 2
    assert came.count(b'"ready"') == 1


def test_the_absolute_form_and_http_1_0_are_understood(server):
    assert ask(server.url, "http://elsewhere.example/ping").json["ready"] is True
    with Wire(server.url) as wire:
        assert wire.send(b"GET /ping HTTP/1.0\r\n\r\n").answer().status == 200
        assert wire.answer() is None


# --- order


def test_pipelined_requests_are_answered_in_their_order(wire):
    asked = [request("/", GOOD), PING, request("/nowhere"), request("/v2/models/news/infer", b"{"), request("/", GOOD)]
    wire.send(b"".join(asked))
    assert [wire.answer().status for _ in asked] == [200, 200, 404, 400, 200]


def test_a_pipeline_is_bounded_and_what_was_taken_is_answered(wire):
    found = wire.send(request("/", GOOD) * 2000).answers()
    assert 1 <= len(found) <= 100
    assert {answer.status for answer in found} == {200}


@pytest.mark.parametrize("garbage", [b"GARBAGE\r\n\r\n", b"\0", b"GET / HTTP/1.1\r\n: x\r\n\r\n"])
def test_garbage_does_not_overtake_the_answer_before_it(wire, garbage):
    answers = wire.send(request("/", GOOD) + garbage).answers()
    assert answers[0].status == 200
    assert answers[0].headers["connection"] == "close"
    assert len(answers) == 1


def test_a_request_that_asks_to_close_is_the_last_one(wire):
    assert len(wire.send(request("/ping", None, b"Connection: close") + PING * 3).answers()) == 1


# --- upgrades and expectations

H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest.mark.parametrize(
    "upgrade", [H2C, (b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")]
)
def test_a_wish_for_another_protocol_is_ignored(wire, upgrade):
    for _ in range(2):
        assert wire.send(request("/ping", None, *upgrade)).answer().status == 200
        assert wire.send(request("/", GOOD, *upgrade)).answer().json[0][0]["score"] > 0
    asked = [request("/", GOOD, *upgrade), request("/nowhere", GOOD), request("/ping", None, *upgrade)]
    assert [wire.send(b"".join(asked)).answer().status] + [wire.answer().status for _ in asked[1:]] == [200, 404, 200]


def test_the_body_of_a_request_with_an_upgrade_is_no_request(wire):
    wire.send(post(b"Content-Length: %d" % len(PING), *H2C), PING, pause=0.1)
    assert_refused(wire.answer(), 400)
    assert wire.send(PING).answer().status == 200


def test_many_upgrades_at_once_are_bounded(wire):
    found = wire.send(request("/ping", None, *H2C) * 3000).answers()
    assert 1 <= len(found) <= 100


def test_an_expectation_is_met_or_the_connection_ends(server):
    with Wire(server.url) as wire:
        wire.send(post(b"Content-Length: %d" % len(GOOD), b"Expect: 100-continue"))
        assert wire.answer().status == 100
        assert wire.send(GOOD).answer().status == 200
    with Wire(server.url) as wire:
        wire.send(request("/nowhere", b"", b"Expect: 100-continue").replace(b": 0", b": 100"))
        answer = wire.answer()
        assert_refused(answer, 404)
        assert answer.headers["connection"] == "close"
