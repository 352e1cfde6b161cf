"""One JSON line a request on stdout, written in bundles; never a text, never a key."""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from kdexport.serve.http import Request

_EVERY_S = 0.1
_encode = msgspec.json.Encoder().encode


class AccessLog:
    """Writes what is asked for: `all`, `errors` (400 and up) or `off`."""

    def __init__(self, which: str, fd: int = 1) -> None:
        self._from = {"all": 0, "errors": 400, "off": 1000}[which]
        self._fd, self._lines, self._refused = fd, list[bytes](), 0

    def request(self, request: Request, code: int, seconds: float, fault: str = "") -> None:
        """Note one request; a fault is for the operator's eyes."""
        if code < self._from and not fault:  # a fault of ours is always told
            return
        client = request.scope.get("client")
        line = {
            "time": round(time.time(), 3),
            "client": client[0] if client else "",
            "method": request.method,
            "path": request.path[:256],
            "code": code,
            "ms": round(1e3 * seconds, 3),
        }
        if request.model:
            line |= {"model": request.model, "protocol": request.protocol, "rows": request.rows}
        if request.tokens:
            line |= {"tokens": request.tokens, "first_ms": round(1e3 * request.first_s, 3)}
        if request.run_s:
            line |= {"queued_ms": round(1e3 * request.queued_s, 3), "run_ms": round(1e3 * request.run_s, 3)}
        if fault:
            line["fault"] = fault
        self._append(line)

    def refused(self) -> None:
        """Note a request that was refused unread; there may be very many, so a bundle has one line for all."""
        if self._refused == 0 and self._from <= 429:
            asyncio.get_running_loop().call_later(_EVERY_S, self._flush_refused)
        self._refused += 1

    def _flush_refused(self) -> None:
        count, self._refused = self._refused, 0
        self._append({"time": round(time.time(), 3), "code": 429, "requests": count})

    def _append(self, line: dict[str, object]) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(_EVERY_S, self.flush)
        self._lines.append(_encode(line))

    def flush(self) -> None:
        """Write what is there."""
        if not self._lines:
            return
        data = b"\n".join([*self._lines, b""])
        self._lines.clear()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # nobody reads the log any more: serving goes on
            self._from = 1000
