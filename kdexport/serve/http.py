"""Requests and responses: bounded bodies, keys compared in constant time, errors as `{"error": …}`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

from kdexport.serve.settings import Settings

if TYPE_CHECKING:
    from kdexport.serve.large import Limiter

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
RETRY: Headers = [(b"retry-after", b"1")]
CLOSE = (b"connection", b"close")
# Proxies must not buffer these.
EVENTS: Headers = [
    (b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")
]  # fmt: skip
FULL = "too much work is waiting"  # of every 429
CLIENT_GONE = 499  # nginx's code for a client that disconnected; logged and counted, never sent
encode = msgspec.json.Encoder().encode
_MAX_MESSAGE = 1000
_HEAD = {b"host", b"content-length", b"content-encoding", b"origin", b"transfer-encoding"}
SMALL = 64 * 1024  # bytes; above, a request is large and takes turns, see `large`


class Refused(Exception):
    """An error response. The message goes to the client: no paths, no tracebacks."""

    def __init__(self, status: int, message: str, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or []


FAILURE = Refused(500, "the server could not answer this; its log says why")


class ClientGone(Exception):
    """The client disconnected."""


class Response(msgspec.Struct):
    """A response; sending adds `content-length`."""

    body: bytes
    status: int = 200
    headers: Headers = msgspec.field(default_factory=lambda: [JSON])


class Stream(msgspec.Struct):
    """A response of server-sent events, of which the first is ready."""

    first: bytes
    rest: AsyncGenerator[bytes, None]
    status: int = 200


def event(content: Any) -> bytes:
    """Encode a server-sent event."""
    return b"data: %b\n\n" % (content if isinstance(content, bytes) else encode(content))


def answer(content: Any, status: int = 200) -> Response:
    """Respond with JSON."""
    return Response(encode(content), status)


def refusal(refused: Refused) -> Response:
    """Return the error response, its message cut: a name in it may be as long as the request."""
    return Response(encode({"error": refused.message[:_MAX_MESSAGE]}), refused.status, [JSON, *refused.headers])


class Request:
    """One HTTP request, with its handler's facts for log and metrics."""

    wanted_model: str | None = None  # None: the first one
    wanted_version: str | None = None
    model = protocol = ""
    rows = 0
    queued_s = run_s = 0.0
    tokens, first_s = 0, 0.0  # generated, and the time to the first one
    origin: bytes | None = None
    _length, _encoding = 0, b""
    _held, _slot = 0, False  # bytes and turn of a large request

    def __init__(self, scope: Scope, receive: Receive, limiter: Limiter | None = None) -> None:
        self.scope, self._receive, self._limiter = scope, receive, limiter
        self._cycle = getattr(receive, "__self__", None)  # uvicorn's
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.host: list[bytes] = []

    def read_head(self) -> None:
        """Read the headers that are checked for every request, in one pass.

        Other transfer encodings than `chunked` are refused: a proxy in front might split the stream differently.
        """
        for key, value in self.scope["headers"]:
            if key not in _HEAD:
                continue
            if key == b"host":
                self.host.append(value)
            elif key == b"content-length":
                self._length = int(value)
            elif key == b"content-encoding":
                self._encoding = value.lower()
            elif key == b"origin":
                self.origin = value
            elif key == b"transfer-encoding" and (value.lower() != b"chunked" or self.scope["http_version"] != "1.1"):
                raise Refused(400, "transfer-encoding may be chunked, in HTTP/1.1", [CLOSE])

    def header(self, name: bytes) -> bytes | None:
        """Return a header's value by its lower-case name."""
        return next((bytes(value) for key, value in self.scope["headers"] if key == name), None)

    def gone(self) -> bool:
        """Return whether the client has disconnected; known on uvicorn alone."""
        return bool(getattr(self._cycle, "disconnected", False))

    async def body(self, settings: Settings, limit: int) -> bytes:
        """Return the whole body, decompressed; call `read_head` first.

        Raises:
            Refused: it is larger than the limit (413), slower than `read_timeout` (408), in an unknown or broken
                encoding (415, 400), or too many large ones are under way (429).
            ClientGone: the connection closed before its end.
        """
        if self._length > limit:
            raise _too_large(limit)
        ends = time.monotonic() + settings.read_timeout
        message = await self._read(ends)
        parts: list[bytes] = [message.get("body", b"")]
        total = len(parts[0])
        while message.get("more_body") and total <= limit:
            self._hold(total)
            message = await self._read(ends)
            parts.append(message.get("body", b""))
            total += len(parts[-1])
        body = b"".join(parts)
        if total > limit:
            raise _too_large(limit)
        if total > SMALL:
            await self.take_slot(total, settings.timeout)
        if self._encoding in (b"", b"identity"):
            return body
        return await self._inflated(body, limit, settings.timeout)

    async def _inflated(self, body: bytes, limit: int, timeout: float) -> bytes:
        # Never beyond the limit: 50 kB of gzip can hold 50 MB.
        if self._encoding not in (b"gzip", b"deflate"):
            raise Refused(415, "content-encoding may be gzip, deflate or identity")
        stream = zlib.decompressobj(wbits=47)  # either header
        try:
            found = stream.decompress(body, min(SMALL, limit) + 1)
            if SMALL < len(found) <= limit:
                await self.take_slot(SMALL, timeout)
                found += await asyncio.to_thread(stream.decompress, stream.unconsumed_tail, limit + 1 - len(found))
        except zlib.error:
            raise Refused(400, "the body is not what its content-encoding says") from None
        if len(found) > limit:
            raise _too_large(limit)
        if not stream.eof or stream.unused_data:
            raise Refused(400, "the compressed body ends too early, or too late")
        return found

    async def take_slot(self, size: int, timeout: float) -> None:
        """Wait for a large request's turn, or refuse it (429); it holds the turn until `end`."""
        self._hold(size)
        if self._limiter and not self._slot:
            await self._limiter.acquire(timeout)
            self._slot = True

    def end(self) -> None:
        """Release a large request's memory and turn, if any."""
        if self._limiter and (self._held or self._slot):
            self._limiter.release(self._held, self._slot)
            self._held, self._slot = 0, False

    def _hold(self, size: int) -> None:
        if self._limiter and size > SMALL and size > self._held:
            self._limiter.reserve(size - self._held)
            self._held = size

    async def _read(self, ends: float) -> MutableMapping[str, Any]:
        # Most bodies have arrived already and need no timer.
        if getattr(self._cycle, "more_body", True):
            try:
                async with asyncio.timeout(ends - time.monotonic()):
                    message = await self._receive()
            except TimeoutError:
                raise Refused(408, "the body came too slowly", [CLOSE]) from None
        else:
            message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message


def _too_large(limit: int) -> Refused:
    # The connection stays open: a client that is still sending would see a reset instead of the response.
    return Refused(413, f"the body has more than {limit:,} bytes")


class Keys:
    """API keys, compared as digests in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Bytes of the environment that are no UTF-8 are lone surrogates.
        self._digests = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, request: Request) -> None:
        """Refuse (401) a request without a known `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
        scheme, _, token = (request.header(b"authorization") or b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else request.header(b"x-api-key") or b""
        digest = hashlib.sha256(given).digest()
        same = [hmac.compare_digest(one, digest) for one in self._digests]  # all of them, whichever is the right one
        if not any(same):
            why = "the API key is not known here" if given else "an API key is needed: Authorization: Bearer KEY"
            raise Refused(401, why, [(b"www-authenticate", b"Bearer")])
