"""HTTP on a bare socket: what no client library would send, and what comes back, byte by byte."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

GOOD = b'{"inputs": "hello", "parameters": {"top_k": 1}}'


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection to a server."""

    def __init__(self, url: str, timeout: float = 10.0, receive_buffer: int | None = None) -> None:
        parts = urlsplit(url)
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect((parts.hostname, parts.port))
        self._came = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes, pause: float = 0.0) -> Wire:
        """Send pieces; a server that has closed meanwhile is for the answer to tell."""
        try:
            for piece in pieces:
                self.socket.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass
        return self

    def answer(self) -> Answer | None:
        """The next answer; None when the connection was closed instead."""
        while b"\r\n\r\n" not in self._came:
            if not self._more():
                assert not self._came, self._came
                return None
        head, _, rest = self._came.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", 0))
        while len(rest) < length:
            came = self._came
            assert self._more(), "an answer was cut off"
            rest += self._came[len(came) :]
        self._came = rest[length:]
        return Answer(int(re.match(r"HTTP/1\.1 (\d{3}) ", first)[1]), headers, rest[:length])

    def answers(self) -> list[Answer]:
        """All answers until the server closes."""
        found = []
        while (one := self.answer()) is not None:
            found.append(one)
        return found

    def rest(self) -> bytes:
        """All bytes until the server closes."""
        while self._more():
            pass
        return self._came

    def closed_after(self) -> float:
        """Seconds until the server closes without another byte."""
        began = time.monotonic()
        assert not self._more(), self._came
        return time.monotonic() - began

    def _more(self) -> bool:
        try:
            came = self.socket.recv(65536)
        except ConnectionError:
            return False
        self._came += came
        return bool(came)


def request(path: str | bytes, body: bytes | None = None, *headers: bytes, method: str = "") -> bytes:
    """A well-formed request around whatever path, body and headers."""
    path = path.encode() if isinstance(path, str) else path
    lines = [b"%s %s HTTP/1.1" % ((method or ("GET" if body is None else "POST")).encode(), path), b"Host: localhost"]
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, *headers, b"", body or b""])


def ask(url: str, path: str | bytes, body: bytes | None = None, *headers: bytes, method: str = "") -> Answer:
    """One request on a connection of its own."""
    with Wire(url) as wire:
        found = wire.send(request(path, body, *headers, b"Connection: close", method=method)).answer()
        assert found is not None, "no answer"
        return found


def is_well(url: str) -> bool:
    """Whether a good request is answered as ever."""
    found = ask(url, "/", GOOD)
    return found.status == 200 and 0 < found.json[0][0]["score"] <= 1


def assert_refused(found: Answer | None, *statuses: int) -> None:
    """A 4xx as JSON that tells what is wrong and nothing of the server's inside."""
    assert found is not None, "no answer"
    assert found.status in (statuses or range(400, 500)), found
    assert found.headers["content-type"] == "application/json"
    assert list(found.json) == ["error"]
    message = found.json["error"]
    assert isinstance(message, str)
    assert 0 < len(message) <= 1000
    assert not re.search(r"Traceback|File \"|\.py\b|site-packages|/tmp|/home|\.onnx|0x[0-9a-f]{6}", message), message
