"""uvicorn's HTTP connection with what it leaves open: bounds on headers, in size and in time, and JSON errors."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kdexport.serve.http import CLOSE, FULL, Response, Send, encode

_MAX_HEAD = 32 * 1024
# Refusals of what costs much before it is refused, or may do so; by how much each one more delays the next, at most.
_COSTLY, _LATER_S, _LATEST_S = (413, 429), 0.01, 0.25
# Requests of one connection that wait for the one before: each is small, but what they become is not.
_MAX_PIPELINED = 32
_CLOSE = b"connection: close\r\n"


class Connection(HttpToolsProtocol):
    """One client's connection.

    It ends after `read_timeout` where a client trickles its head, never begins a request, or goes on with a body that
    nobody waits for; after uvicorn's keep-alive time where no request is under way, or nobody reads the answers. A body
    that is read has its handler's timer.
    """

    read_timeout = 10.0
    max_connections = 4096

    full: Callable[[], int] = staticmethod(lambda: 0)  # seconds to come again after, while there is too much work
    on_refused: Callable[[], object] = staticmethod(lambda: None)  # called of every request that is refused here

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._begun = False  # whether some of a head has come, and not all
        self._beside = 0  # bytes that came since something was whole: of a head, of trailers, of a chunk's extensions
        self._refusing = 0  # while a request is being refused: Retry-After, in seconds
        self.refusals = 0  # one after the other, for being too large or too many
        self._later: TimerHandle | None = None  # while the next request is not read yet
        self._unread: TimerHandle | None = None  # since more was written than the client reads
        self._answered: RequestResponseCycle | None = None  # the request that is being answered
        self._timer: TimerHandle | None = self.loop.call_later(self.read_timeout, self._too_slow)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers, and tell the request that is being answered."""
        for timer in filter(None, (self._timer, self._unread, self._later)):
            timer.cancel()
        # uvicorn tells the newest request alone; the one that is being answered stands before all in the pipeline.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes; bound what they leave incomplete. Most heads come whole and cost no timer."""
        self._unset_keepalive_if_required()
        self._beside += len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._give_up(400, "this is no HTTP request")
                return
        if self._beside > _MAX_HEAD:
            self._give_up(431, "the request's head is too large")
        elif self._timer is None and (self._begun or (self.timeout_keep_alive_task is None and self._is_idle())):
            self._timer = self.loop.call_later(self.read_timeout, self._too_slow)

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        """Begin to answer, or to refuse: while the queue is full, a body is not kept, and a request becomes no task."""
        if self._beside > _MAX_HEAD:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > _MAX_HEAD:
                self._give_up(431, "the request's head is too large")
                raise _NoMoreError
        if self._refusing or len(self.pipeline) >= _MAX_PIPELINED:  # answers must keep their requests' order
            raise _NoMoreError
        self._beside = 0
        if self.parser.should_upgrade():  # it will come again, see `_without_upgrade`
            return
        self._head_complete()
        if self._is_idle() and self.parser.get_method() == b"POST" and not self.expect_100_continue:
            self._refusing = self.full()
        if self._refusing:
            self._timer = self.loop.call_later(self.read_timeout, self._too_slow)
        else:
            super().on_headers_complete()
            if not self.pipeline:
                self._answered = self.cycle
            if self.expect_100_continue:
                # An answer that comes without a 100 leaves open whether the body will follow.
                self.cycle.keep_alive = False
        self.headers = []  # where trailers go: they are none of the request's headers

    def on_response_complete(self) -> None:
        """Go on with the next request that waits."""
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        """Keep the body of a request that is answered."""
        self._beside = 0
        if not self._refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._beside = 0
        if self.parser.should_upgrade():
            return
        if not self._refusing:
            if self.cycle.response_complete:  # long since: only its body was still to come
                self._head_complete()
                self._await_next()
            super().on_message_complete()
            return
        self._head_complete()
        self.on_refused()
        self._refuse_full(self.parser.should_keep_alive())

    def pause_writing(self) -> None:
        """Read no more from a client that does not read, and wait for it for a while only."""
        super().pause_writing()
        self.flow.pause_reading()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """Resume once the write buffer drains."""
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():  # closing also waits for what is left
            self._unread.cancel()
            self._unread = None
            self.flow.resume_reading()

    def answered(self, status: int) -> None:
        """Read later and later from a client whose requests are refused one after the other, so that floods ebb."""
        self.refusals = self.refusals + 1 if status in _COSTLY else 0
        if self.refusals > 1 and not self.transport.is_closing():
            self.flow.pause_reading()
            self._later = self.loop.call_later(min(_LATEST_S, _LATER_S * self.refusals), self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _is_idle(self) -> bool:
        """Whether no answer is owed."""
        return (self.cycle is None or self.cycle.response_complete) and not self._refusing

    def _head_complete(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._begun = False

    def _await_next(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _without_upgrade(self, rest: bytes) -> bytes:
        """A request's head again, without its wish for another protocol, which a server may ignore; and what follows.

        The parser would leave out the request's body, and then take it for another request.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._give_up(405, "CONNECT is for proxies")
            return b""
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        return b"".join((method, b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n", rest))

    def _refuse_full(self, keep_alive: bool) -> None:
        seconds, self._refusing = self._refusing, 0
        if self.transport.is_closing():
            return
        retry = b"retry-after: %d\r\n" % seconds
        self.transport.write(_error(429, FULL, retry if keep_alive else retry + _CLOSE))
        if keep_alive:
            self._await_next()
            self.answered(429)
        else:
            self.transport.close()

    def _too_slow(self) -> None:
        self._timer = None
        if self._begun and not self._is_idle():  # the one before is still being answered, and is answered first
            self._timer = self.loop.call_later(self.read_timeout, self._too_slow)
        elif self._begun or self._refusing:
            self._refuse(408, "the request came too slowly")
        else:
            self.transport.close()

    def _give_up(self, status: int, message: str) -> None:
        """No more can be read here: close, after the answers to what was whole, or with the reason."""
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        else:
            self._refuse(status, message)

    def _refuse(self, status: int, message: str) -> None:
        """Say why, unless the request at fault was answered long since; then close."""
        if self.transport.is_closing():
            return
        if self._begun or self._refusing or self.cycle is None or not self.cycle.response_started:
            self.transport.write(_error(status, message, _CLOSE))
        self.transport.close()


class _NoMoreError(Exception):
    """Raised in the parser's callbacks, it ends the parsing."""


def _error(status: int, message: str, headers: bytes) -> bytes:
    body = encode({"error": message})
    head = b"content-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (len(body), headers)
    return b"".join((STATUS_LINE[status], head, body))


async def respond(send: Send, response: Response, closing: bool = False) -> None:
    """Send a whole answer. On our own connections it is one write, where ASGI's two messages would be two."""
    status, body = response.status, response.body
    headers = [*response.headers, (b"content-length", b"%d" % len(body))]
    if closing:
        headers.append(CLOSE)
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.flow.write_paused or cycle.scope["method"] == "HEAD":
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return
    if cycle.disconnected:
        return
    if CLOSE in headers:
        cycle.keep_alive = False
    elif not cycle.keep_alive:
        headers.append(CLOSE)
    lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
    cycle.response_started = cycle.response_complete = True
    cycle.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    connection = cycle.on_response.__self__  # type: ignore[attr-defined] # a bound method
    if isinstance(connection, Connection) and (status in _COSTLY or connection.refusals):
        connection.answered(status)


def limited(**attributes: Any) -> type[Connection]:
    """Return the class with a server's limits: `read_timeout`, `max_connections`, `full`, `on_refused`."""
    return type("Limited", (Connection,), {k: staticmethod(v) if callable(v) else v for k, v in attributes.items()})
