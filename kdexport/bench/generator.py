"""Load on an HTTP server, in closed loops (each client waits for its response) and open ones.

In an open loop, send times do not depend on the server and latency counts from the scheduled time, so a server that
stalls can't hide its queue (no coordinated omission). `python -m kdexport.bench.generator` reads and writes JSON.
"""

import itertools
import random
import re
import socket
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kdexport.errors import KdexportError
from kdexport.tasks.config import Row
from kdexport.tasks.inputs.media import bytes_of

_TIMEOUT_S = 30.0
_WARM_S = 0.5


class LoadError(KdexportError):
    """An unreachable server, or an error response."""


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """One load: a closed loop when `rate` (requests/s) is None; else `poisson` or evenly spaced arrivals."""

    url: str
    rows: str
    connections: int
    rate: float | None
    poisson: bool
    seconds: float
    seed: int


class LoadSamples(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of each successful request, the number of failed ones, and the load's duration."""

    latency_ms: list[float]
    errors: int
    seconds: float


class Connection:
    """A persistent HTTP/1.1 connection for POST; a plain socket, because the client's time is measured too.

    Raises:
        LoadError: the server is unreachable, or its status is not 200.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise LoadError(f"{url} is no http address", "Write it like http://127.0.0.1:8080/predict")
        self._url, self._address = url, (parts.hostname, parts.port or 80)
        self._head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._socket: socket.socket | None = None

    def post(self, body: bytes) -> bytes:
        """Send a JSON body; return the response body."""
        request = f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, _TIMEOUT_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(request)
            status, answer = self._read(self._socket)
        except OSError as error:
            self.close()
            raise LoadError(f"{self._url} does not answer: {error}", "Is the server up?") from None
        if status != 200:
            raise LoadError(f"{self._url} answers {status}: {answer[:200].decode(errors='replace')}")
        return answer

    def close(self) -> None:
        """Close the socket; the next `post` opens another."""
        if self._socket:
            self._socket.close()
        self._socket = None

    def _read(self, opened: socket.socket) -> tuple[int, bytes]:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more(opened)
        head, body = data[:end].lower(), data[end + 4 :]
        if length := re.search(rb"content-length: *(\d+)", head):
            while len(body) < int(length[1]):
                body += self._more(opened)
        elif b"transfer-encoding: chunked" in head:
            while not body.endswith(b"0\r\n\r\n"):
                body += self._more(opened)
            body = b"".join(_chunks(body))
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), body

    def _more(self, opened: socket.socket) -> bytes:
        if part := opened.recv(65536):
            return part
        raise ConnectionResetError("the server closed the connection")


def body_of(url: str, rows: Sequence[Row]) -> bytes:
    """Encode rows in the URL's protocol.

    `…/infer` is the Open Inference Protocol, `…/predict` text-embeddings-inference, anything else Hugging Face's
    inference API. Images and audio are base64, one per request.

    Raises:
        LoadError: the protocol has no request for such rows.
    """
    path, first = urlsplit(url).path, rows[0]
    if "text" not in first:
        modality = next(name for name in ("image", "audio") if name in first)
        if path.endswith("/infer"):
            predict = f"{url.partition('/v2/')[0]}/predict"
            raise LoadError(f"{url} takes arrays, and the rows are of {modality}", f"Name {predict}")
        if len(rows) > 1:
            raise LoadError(f"{url} takes one row of {modality} a request")
        return msgspec.json.encode({"inputs": b64encode(bytes_of(first[modality])).decode()})
    pairs = first.get("text_pair") is not None
    columns = ("text", "text_pair") if pairs else ("text",)
    if path.endswith("/infer"):
        values = {name: [row[name] for row in rows] for name in columns}
        tensors = [{"name": k, "shape": [len(v)], "datatype": "BYTES", "data": v} for k, v in values.items()]
        return msgspec.json.encode({"inputs": tensors})
    inputs: list[Any] = [{name: row[name] for name in columns} if pairs else row["text"] for row in rows]
    if path.endswith("/predict") and (pairs or len(rows) > 1):
        inputs = [[row[name] for name in columns] for row in rows]
    return msgspec.json.encode({"inputs": inputs if len(rows) > 1 else inputs[0]})


def load(job: LoadJob) -> LoadSamples:
    """Put a load on a server; the first half second is a warm-up."""
    rows = msgspec.json.decode(Path(job.rows).read_bytes())
    bodies = [body_of(job.url, [row]) for row in rows]
    Connection(job.url).post(bodies[0])  # fail once if the server is down, not once per request
    begun = time.monotonic()
    due = None if job.rate is None else iter(list(_due(job, begun)))
    counter = itertools.count()
    found: list[tuple[float, float]] = []  # (when due or sent, ms)
    failed: list[float] = []
    lock = threading.Lock()

    def client() -> None:
        connection = Connection(job.url)
        while True:
            with lock:
                at = next(due, None) if due else time.monotonic()
                number = next(counter)
            if at is None or at > begun + _WARM_S + job.seconds:
                return
            _wait_until(at)
            try:
                msgspec.json.decode(connection.post(bodies[number % len(bodies)]))
                found.append((at, (time.monotonic() - at) * 1e3))
            except (LoadError, msgspec.DecodeError):
                failed.append(at)

    with ThreadPoolExecutor(job.connections) as pool:
        for done in [pool.submit(client) for _ in range(job.connections)]:
            done.result()
    counted = begun + _WARM_S
    latency, errors = [ms for at, ms in found if at >= counted], sum(at >= counted for at in failed)
    return LoadSamples(latency_ms=latency, errors=errors, seconds=time.monotonic() - counted)


def _wait_until(at: float) -> None:
    """Sleep, then spin: a sleep alone ends some 0.1 ms late, which would count as latency."""
    if (wait := at - time.monotonic() - 1.5e-4) > 0:
        time.sleep(wait)
    while time.monotonic() < at:
        time.sleep(0)  # lets other threads run


def _due(job: LoadJob, begun: float) -> Iterator[float]:
    """Yield send times."""
    assert job.rate is not None
    chance, at = random.Random(job.seed), begun
    while at < begun + _WARM_S + job.seconds:
        yield at
        at += chance.expovariate(job.rate) if job.poisson else 1 / job.rate


def _chunks(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        yield rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]


def main() -> None:
    """Read a job from stdin, write its samples to stdout."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadJob)
    sys.stdout.buffer.write(msgspec.json.encode(load(job)))


if __name__ == "__main__":
    main()
