"""A request and its answer: capped bodies, keys in constant time, errors as `{"error": …}`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeVar

import msgspec

from kdexport.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Found = TypeVar("Found")

JSON = (b"content-type", b"application/json")
# Proxies that gather answers before they pass them on let these through as they come.
EVENTS: Headers = [
    (b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")
]  # fmt: skip
FULL = "too much work is waiting"  # of every 429, whoever says it
encode = msgspec.json.Encoder().encode
_MAX_MESSAGE = 1000
_HEAD = {b"host", b"content-length", b"content-encoding", b"origin", b"transfer-encoding"}
# Bytes that are read or written within a millisecond or so: a thread would only make them later.
_SMALL = 64 * 1024
_MAX_ANSWER = 16 * 1024 * 1024


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


async def off_loop(size: int, work: Callable[..., Found], *arguments: Any) -> Found:
    """Call a function that reads or writes so many bytes; on a thread if they are many, so that others are answered."""
    return await asyncio.to_thread(work, *arguments) if size > _SMALL else work(*arguments)


def check_answer(size: int, advice: str) -> int:
    """Return the estimated bytes of an answer.

    Raises:
        Refused: they are too many (413).
    """
    if size > _MAX_ANSWER:
        raise Refused(413, f"the answer would have {size >> 20} MiB, of {_MAX_ANSWER >> 20} at most: {advice}")
    return size


class Request:
    """One HTTP request; what its handler finds out is kept for the log and the metrics."""

    __slots__ = (
        "_encoding", "_length", "_receive", "first_s", "host", "method", "model", "origin", "path", "protocol",
        "queued_s", "rows", "run_s", "scope", "tokens",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self._receive = scope, receive
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
                encoding (415, 400).
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
                parts.append(message["body"])
            body = b"".join(parts)
        else:
            body = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        return body if self._encoding in (b"", b"identity") else _inflate(body, self._encoding, limit)

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


def _inflate(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Gzip or deflate, never further than the limit: 50 kB of gzip can hold 50 MB."""
    if encoding not in (b"gzip", b"deflate"):
        raise Refused(415, "content-encoding may be gzip, deflate or identity")
    stream = zlib.decompressobj(wbits=47)  # either header
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error:
        raise Refused(400, "the body is not what its content-encoding says") from None
    if len(data) > limit:
        raise _too_large(limit)
    if not stream.eof or stream.unused_data:
        raise Refused(400, "the compressed body ends too early, or too late")
    return data


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
