"""While the queue is full the connection refuses by itself: in order, bounded, and never twice."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
import uvicorn
from wire import GOOD, Wire, request

from kdexport.serve.connection import limited


@asynccontextmanager
async def full_server(full: list[int]):
    """The connection class under uvicorn, with an application that says its path; `full` is asked in turn."""
    refused = []

    async def app(scope, receive, send):
        if scope["path"] == "/slow":
            await asyncio.sleep(0.8)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    cls = limited(
        read_timeout=0.3,
        max_connections=100,
        full=lambda: full.pop(0) if full else 0,
        on_refused=lambda: refused.append(1),
    )
    config = uvicorn.Config(app, port=0, http=cls, ws="none", lifespan="off", interface="asgi3", log_config=None)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", refused
    finally:
        await server.shutdown()


ONE, LAST = request("/", GOOD), request("/", GOOD, b"Connection: close")
CHUNKS = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "full", "statuses"),
    [
        (LAST, [7], [429]),
        (ONE + LAST, [7, 7], [429, 429]),
        (ONE + ONE + LAST, [7], [429, 200, 200]),
        (ONE + request("/ping", None, b"Connection: close"), [7, 7], [429, 200]),
        (ONE + LAST, [0, 7], [200, 200]),  # behind one that is answered there is no refusing
        (ONE + b"GARBAGE\r\n\r\n", [7], [429, 400]),
        (ONE[:-3], [7], [408]),
        (ONE[:-3] + b"\0" * 3 + b"GARBAGE\r\n\r\n", [7], [429, 400]),
        (request("/", b"x" * 1_000_000, b"Connection: close"), [7], [429]),
        (CHUNKS + b"0\r\n" + b"a: b\r\n" * 50_000, [7], [431]),
    ],
    ids=[
        "one", "two", "and then room", "a GET behind", "behind an answer", "garbage behind", "a body that stops",
        "garbage behind a body", "a large body", "trailers",
    ],
)  # fmt: skip
def test_refusals_keep_the_order_of_their_requests(sent, full, statuses):
    async def converse():
        async with full_server(list(full)) as (url, refused):
            return await asyncio.to_thread(talk, url), refused

    def talk(url):
        with Wire(url) as wire:
            return wire.send(sent).answers()

    answers, refused = asyncio.run(converse())
    assert [answer.status for answer in answers] == statuses
    refusals = [answer for answer in answers if answer.status == 429]
    assert [answer.headers["retry-after"] for answer in refusals] == ["7"] * len(refusals)
    assert len(refused) == len(refusals)
    assert answers[-1].headers["connection"] == "close"


def test_a_head_that_trickles_behind_a_slow_answer_waits_for_it():
    async def converse():
        async with full_server([]) as (url, _):
            return await asyncio.to_thread(talk, url)

    def talk(url):
        with Wire(url) as wire:
            return wire.send(request("/slow", GOOD) + ONE[:20]).answers()

    assert [answer.status for answer in asyncio.run(converse())] == [200, 408]


def test_refusals_that_nobody_reads_are_bounded():
    async def flood():
        async with full_server([7] * 1_000_000) as (url, refused):
            return await asyncio.to_thread(send_on, url), refused

    def send_on(url):
        sent = 0
        with Wire(url, timeout=0.3, receive_buffer=4096) as wire:
            while sent < 400_000:
                try:
                    wire.socket.sendall(ONE * 100)
                except TimeoutError:
                    break
                sent += 100
        return sent

    sent, refused = asyncio.run(flood())
    assert len(refused) <= sent < 400_000  # the kernel's buffers are full on both sides
