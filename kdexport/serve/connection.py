"""uvicorn's HTTP connection with bounds on headers, in size and time, and JSON errors."""

from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kdexport.serve.http import CLOSE, FULL, Response, Send, encode

_MAX_HEAD = 32 * 1024
# Statuses of refusals that cost much; delay of reading per consecutive one, and its maximum.
_COSTLY, _LATER_S, _LATEST_S = (413, 429), 0.01, 0.25
_MAX_PIPELINED = 32  # waiting requests of one connection
_CLOSE = b"connection: close\r\n"


class Connection(HttpToolsProtocol):
    """One client's connection.

    It ends after `read_timeout` without a complete head, without a request, or in a body that is no longer read; after
    uvicorn's keep-alive time when idle, or when the client does not read. A body that is read has its handler's timer.
    """

    read_timeout = 10.0
    max_connections = 4096

    full: Callable[[], int] = staticmethod(lambda: 0)  # Retry-After in seconds, while there is too much work
    on_refused: Callable[[], object] = staticmethod(lambda: None)  # called for every request refused here

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._begun = False  # in the middle of a head
        self._beside = 0  # bytes of an incomplete head, trailers or chunk extensions
        self._refusing = 0  # Retry-After in seconds, while refusing a request
        self.refusals = 0  # consecutive costly ones
        self._later: TimerHandle | None = None  # delays the next request
        self._unread: TimerHandle | None = None  # while the client does not read
        self._answered: RequestResponseCycle | None = None  # the request under way
        self._timer: TimerHandle | None = self.loop.call_later(self.read_timeout, self._too_slow)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and disconnect the request under way."""
        for timer in filter(None, (self._timer, self._unread, self._later)):
            timer.cancel()
        # uvicorn disconnects only the newest request of a pipeline.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, and bound incomplete heads in size and time."""
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
        """Start the request, or refuse it while the queue is full, without a task or its body."""
        if self._beside > _MAX_HEAD:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > _MAX_HEAD:
                self._give_up(431, "the request's head is too large")
                raise _NoMoreError
        if self._refusing or len(self.pipeline) >= _MAX_PIPELINED:  # responses keep the requests' order
            raise _NoMoreError
        self._beside = 0
        if self.parser.should_upgrade():  # parsed again, see `_without_upgrade`
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
            if self.expect_100_continue:  # without a 100, whether the body follows is undefined
                self.cycle.keep_alive = False
        self.headers = []  # trailers must not join the request's headers

    def on_response_complete(self) -> None:
        """Continue with the next pipelined request."""
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        """Pass a body on, unless its request is refused."""
        self._beside = 0
        if not self._refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._beside = 0
        if self.parser.should_upgrade():
            return
        if not self._refusing:
            if self.cycle.response_complete:  # answered before its body ended
                self._head_complete()
                self._await_next()
            super().on_message_complete()
            return
        self._head_complete()
        self.on_refused()
        retry = b"retry-after: %d\r\n" % self._refusing
        if not self.parser.should_keep_alive():
            self._refuse(429, FULL, retry)
        elif not self.transport.is_closing():
            self.transport.write(_error(429, FULL, retry))
            self._await_next()
            self.answered(429)
        self._refusing = 0

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read; close after the keep-alive time."""
        super().pause_writing()
        self.flow.pause_reading()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """Resume once the write buffer drains."""
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():  # closing waits for the buffer, too
            self._unread.cancel()
            self._unread = None
            self.flow.resume_reading()

    def answered(self, status: int) -> None:
        """Delay reading from a client with consecutive costly refusals, against floods."""
        self.refusals = self.refusals + 1 if status in _COSTLY else 0
        if self.refusals > 1 and not self.transport.is_closing():
            self.flow.pause_reading()
            self._later = self.loop.call_later(min(_LATEST_S, _LATER_S * self.refusals), self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _is_idle(self) -> bool:
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
        """Return a request's head without `Upgrade`, which a server may ignore, and the rest of the bytes.

        The parser would skip the request's body, and then parse it as another request.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._give_up(405, "CONNECT is for proxies")
            return b""
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        return b"".join((method, b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n", rest))

    def _too_slow(self) -> None:
        self._timer = None
        if self._begun and not self._is_idle():  # the request before is under way
            self._timer = self.loop.call_later(self.read_timeout, self._too_slow)
        elif self._begun or self._refusing:
            self._refuse(408, "the request came too slowly")
        else:
            self.transport.close()

    def _give_up(self, status: int, message: str) -> None:
        """Close after the responses to complete requests, or with an error."""
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        else:
            self._refuse(status, message)

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        """Respond with an error, unless the request was answered already; then close."""
        if self.transport.is_closing():
            return
        if self._begun or self._refusing or self.cycle is None or not self.cycle.response_started:
            self.transport.write(_error(status, message, headers + _CLOSE))
        self.transport.close()


class _NoMoreError(Exception):
    """Raised in the parser's callbacks, to end parsing."""


def _error(status: int, message: str, headers: bytes) -> bytes:
    body = encode({"error": message})
    head = b"content-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (len(body), headers)
    return b"".join((STATUS_LINE[status], head, body))


async def respond(send: Send, response: Response, closing: bool = False) -> None:
    """Send a whole response; on our own connections with one write instead of ASGI's two."""
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
