"""A request and its answer: capped bodies, keys in constant time, errors as `{"error": …}`."""

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
    from kdexport.serve.large import Turns

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
# Proxies that gather answers before they pass them on let these through as they come.
EVENTS: Headers = [
    (b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")
]  # fmt: skip
FULL = "too much work is waiting"  # of every 429, whoever says it
encode = msgspec.json.Encoder().encode
_MAX_MESSAGE = 1000
_HEAD = {b"host", b"content-length", b"content-encoding", b"origin", b"transfer-encoding"}
# Bytes of a body from which on a request is large: it takes turns with others, see `large`.
SMALL = 64 * 1024


class Refused(Exception):
    """An answer other than 200. The message goes to the client: no paths, no traces."""

    def __init__(self, status: int, message: str, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or []


class ClientGone(Exception):
    """The client went away before its request was complete."""


class Response(msgspec.Struct):
    """What goes back; `content-length` is added when it is sent."""

    body: bytes
    status: int = 200
    headers: Headers = msgspec.field(default_factory=lambda: [JSON])


class Stream(msgspec.Struct):
    """An answer that goes back as it comes, as server-sent events; the first one is there already."""

    first: bytes
    rest: AsyncGenerator[bytes, None]
    status: int = 200


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % (content if isinstance(content, bytes) else encode(content))


def answer(content: Any, status: int = 200) -> Response:
    """Anything msgspec encodes, as JSON."""
    return Response(encode(content), status)


def refusal(refused: Refused) -> Response:
    """A refused request's answer, as every protocol here has it; a name in it may be as long as the request."""
    return Response(encode({"error": refused.message[:_MAX_MESSAGE]}), refused.status, [JSON, *refused.headers])


class Request:
    """One HTTP request; what its handler finds out is kept for the log and the metrics."""

    __slots__ = (
        "_encoding", "_held", "_length", "_receive", "_turn", "_turns", "first_s", "host", "large", "method", "model",
        "origin", "path", "protocol", "queued_s", "rows", "run_s", "scope", "tokens",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, turns: Turns | None = None) -> None:
        self.scope, self._receive, self._turns = scope, receive, turns
        self._held, self._turn, self.large = 0, False, False
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.model, self.protocol, self.rows = "", "", 0
        self.queued_s = self.run_s = 0.0
        self.tokens, self.first_s = 0, 0.0  # written, and when the first one was
        self._length, self._encoding = 0, b""
        self.host: list[bytes] = []
        self.origin: bytes | None = None

    def read_head(self) -> None:
        """Note what every request is asked for, in one pass over its headers.

        Of transfer encodings only plain chunks are taken: what a proxy in front may read otherwise, it cuts otherwise.

        Raises:
            Refused: the transfer encoding is another one (400).
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
                raise Refused(400, "transfer-encoding may be chunked, in HTTP/1.1", [(b"connection", b"close")])

    def header(self, name: bytes) -> bytes | None:
        """A header's value; names are in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return None

    def gone(self) -> bool:
        """Whether the client has closed the connection, as far as uvicorn knows; other servers don't say."""
        return bool(getattr(getattr(self._receive, "__self__", None), "disconnected", False))

    async def body(self, settings: Settings) -> bytes:
        """The whole body, decompressed; after `read_head`.

        Bytes are counted as they come: a declared length may lie, and chunks declare none.

        Raises:
            Refused: it is larger than `max_body` (413), slower than `read_timeout` (408), in an unknown or broken
                encoding (415, 400), or too many large ones are under way (429).
            ClientGone: the connection closed before its end.
        """
        limit = settings.max_body
        if self._length > limit:
            raise _too_large(limit)
        ends = time.monotonic() + settings.read_timeout
        message = await self._read(settings.read_timeout)
        if message.get("more_body"):
            parts, total = [message["body"]], len(message["body"])
            while message.get("more_body"):
                message = await self._read(ends - time.monotonic())
                total += len(message["body"])
                if total > limit:
                    raise _too_large(limit)
                self._hold(total)
                parts.append(message["body"])
            body = b"".join(parts)
        else:
            body = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if len(body) > SMALL:
            await self.take_turn(len(body), settings.timeout)
        if self._encoding in (b"", b"identity"):
            return body
        stream = _Inflating(body, self._encoding, limit)
        if not stream.small():
            await self.take_turn(SMALL, settings.timeout)
            await asyncio.to_thread(stream.rest)
        return stream.data

    async def take_turn(self, size: int, timeout: float) -> None:
        """Wait until a large request is worked on; it holds its turn until `end`.

        Raises:
            Refused: too many others wait (429).
        """
        self._hold(size)
        if self._turns and not self._turn:
            await self._turns.take(timeout)
            self._turn = self.large = True

    def end(self) -> None:
        """Give back what a large request held, if anything."""
        if self._turns and (self._held or self._turn):
            self._turns.end(self._held, self._turn)
            self._held, self._turn, self.large = 0, False, False

    def _hold(self, size: int) -> None:
        if self._turns and size > SMALL and size > self._held:
            self._turns.hold(size - self._held)
            self._held, self.large = size, True

    async def _read(self, timeout: float) -> MutableMapping[str, Any]:
        if not self._whole():
            try:
                async with asyncio.timeout(timeout):
                    message = await self._receive()
            except TimeoutError:
                raise Refused(408, "the body came too slowly", [(b"connection", b"close")]) from None
        else:
            message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message

    def _whole(self) -> bool:
        """Whether the body is there already, as for most requests: then no timer is needed."""
        return not getattr(getattr(self._receive, "__self__", None), "more_body", True)


def _too_large(limit: int) -> Refused:
    # The connection stays open for the rest: a client that is still sending would see it break, and no answer.
    return Refused(413, f"the body has more than {limit:,} bytes")


class _Inflating:
    """Gzip or deflate, never further than the limit: 50 kB of gzip can hold 50 MB."""

    def __init__(self, body: bytes, encoding: bytes, limit: int) -> None:
        if encoding not in (b"gzip", b"deflate"):
            raise Refused(415, "content-encoding may be gzip, deflate or identity")
        self._stream, self._limit = zlib.decompressobj(wbits=47), limit  # either header
        self._body, self.data = body, b""

    def small(self) -> bool:
        """Inflate the first 64 KiB, and say whether that is all."""
        self._read(self._body, min(SMALL, self._limit) + 1)
        if len(self.data) <= SMALL:
            self._check()
        return len(self.data) <= SMALL

    def rest(self) -> None:
        """Inflate the remaining bytes."""
        self._read(self._stream.unconsumed_tail, self._limit + 1 - len(self.data))
        self._check()

    def _read(self, body: bytes, most: int) -> None:
        try:
            self.data += self._stream.decompress(body, most) if most > 0 else b""
        except zlib.error:
            raise Refused(400, "the body is not what its content-encoding says") from None

    def _check(self) -> None:
        if len(self.data) > self._limit:
            raise _too_large(self._limit)
        if not self._stream.eof or self._stream.unused_data:
            raise Refused(400, "the compressed body ends too early, or too late")


class Keys:
    """API keys, kept and compared as digests: no comparison tells by its time how much of a key was right."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Python hands bytes of the environment that are no UTF-8 over as lone surrogates.
        self._digests = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, request: Request) -> None:
        """Let a request pass that carries a key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`.

        Raises:
            Refused: it carries none, or another (401).
        """
        bearer = request.header(b"authorization") or b""
        scheme, _, token = bearer.partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else request.header(b"x-api-key") or b""
        digest, known = hashlib.sha256(given).digest(), False
        for one in self._digests:
            known |= hmac.compare_digest(one, digest)
        if not known:
            raise Refused(401, "an API key is needed: Authorization: Bearer KEY", [(b"www-authenticate", b"Bearer")])
