"""uvicorn's HTTP connection with what it leaves open: bounds on headers, in size and in time, and JSON errors."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kdexport.serve.http import Headers, Send, encode

_MAX_HEADERS = 32 * 1024
FULL = "too much work is waiting"
_BODY = encode({"error": FULL})
_FULL = (
    STATUS_LINE[429]
    + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(_BODY)
    + b"retry-after: %d\r\n%b\r\n"
    + _BODY
)


class Connection(HttpToolsProtocol):
    """One client's connection.

    A client that trickles its headers, or never begins a request, is cut off after `read_timeout`; idle time
    between requests is bounded by uvicorn's keep-alive timer.
    """

    read_timeout = 10.0
    max_connections = 4096
    refused_delay = 0.0

    @staticmethod
    def full() -> int:
        """Seconds after which a client may come again while there is too much work; 0 while there is not."""
        return 0

    @staticmethod
    def on_refused() -> None:
        """Told of every request that was refused here."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin waiting for the first request."""
        super().connection_made(transport)
        self._begun = False  # whether some of a head has come, and not all
        self._head = 0  # its bytes
        self._refusing = 0  # while a request is being refused: Retry-After, in seconds
        self._timer: TimerHandle | None = self.loop.call_later(self.read_timeout, self._too_slow)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._head_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Let the bytes be parsed; bound what they leave incomplete. Most heads come whole and cost no timer."""
        begun = self._begun
        super().data_received(data)
        if self._begun:
            self._head += len(data) if begun else 0  # a piece may begin with the body before
            if self._timer is None:
                self._timer = self.loop.call_later(self.read_timeout, self._too_slow)
            if self._head > _MAX_HEADERS:
                self._refuse(431, "the request's head is too large")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        """The head is whole: begin to answer, or to refuse.

        While the queue is full, no more is spent on a request than it takes to say so: its body is not kept, it
        becomes no task. What that saves goes to those who are served.
        """
        self._head_complete()
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.parser.get_method() == b"POST" and not self.expect_100_continue:
            self._refusing = self.full()
        if self._refusing:
            self._timer = self.loop.call_later(self.read_timeout, self._too_slow)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep the body of what is answered."""
        if not self._refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if not self._refusing:
            super().on_message_complete()
            return
        self._head_complete()
        self.on_refused()
        if not self.refused_delay:
            self._say_full(self.parser.should_keep_alive())
            return
        # A client that comes again at once waits a little first.
        self.flow.pause_reading()
        self.loop.call_later(self.refused_delay, self._say_full, self.parser.should_keep_alive())

    def send_400_response(self, msg: str) -> None:
        """An answer to what is no HTTP."""
        self._refuse(400, "this is no HTTP request")

    def _head_complete(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._begun, self._head = False, 0

    def _say_full(self, keep_alive: bool) -> None:
        seconds, self._refusing = self._refusing, 0
        if self.transport.is_closing():
            return
        close = b"" if keep_alive else b"connection: close\r\n"
        self.transport.write(_FULL % (seconds, close))
        if keep_alive:
            self.flow.resume_reading()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            self.transport.close()

    def _too_slow(self) -> None:
        self._timer = None
        if self._begun or self._refusing:
            self._refuse(408, "the request came too slowly")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = encode({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        if not self.transport.is_closing():
            self.transport.write(b"".join((STATUS_LINE[status], head, body)))
            self.transport.close()


async def respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a whole answer. On our own connections it is one write, where ASGI's two messages would be two."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.flow.write_paused or cycle.scope["method"] == "HEAD":
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return
    if cycle.disconnected:
        return
    close = (b"connection", b"close")
    if close in headers:
        cycle.keep_alive = False
    elif not cycle.keep_alive:
        headers = [*headers, close]
    lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
    cycle.response_started = cycle.response_complete = True
    cycle.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()


def limited(**attributes: Any) -> type[Connection]:
    """The class with a server's limits: `read_timeout`, `max_connections`, `refused_delay`, `full`, `on_refused`."""
    return type("Limited", (Connection,), {k: staticmethod(v) if callable(v) else v for k, v in attributes.items()})
