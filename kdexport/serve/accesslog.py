"""One JSON line per request on stdout, written in bundles by a thread; never a text, never a key.

Logging does not block: while the output is full, lines are dropped, counted, and reported in one line afterwards.
"""

import asyncio
import re
import time
from collections.abc import Callable

from kdexport.progress import Outlet
from kdexport.serve.http import Request, encode

_EVERY_S = 0.1
# DEL, and U+0080 to U+009F as UTF-8: JSON lets them stand as they are, and terminals obey them.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]")


class AccessLog:
    """Log of `all` requests, `errors` (400 and up) or none (`off`)."""

    def __init__(self, which: str, fd: int = 1, on_dropped: Callable[[int], None] = lambda _: None) -> None:
        self._from = {"all": 0, "errors": 400, "off": 1000}[which]
        self._lines, self._refused = list[bytes](), 0
        self._outlet = Outlet(fd, _dropped_line, on_dropped)

    def request(self, request: Request, code: int, seconds: float, fault: str = "") -> None:
        """Log a request, always if it failed by an internal error, `fault`."""
        if code < self._from and not fault:
            return
        client = request.scope.get("client")
        line = {"time": round(time.time(), 3), "client": client[0] if client else "", "method": request.method}
        line |= {"path": request.path[:256], "code": code, "ms": round(1e3 * seconds, 3)}
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
        """Log a request refused unread; a bundle has one line for all of them."""
        if self._refused == 0 and self._from <= 429:
            asyncio.get_running_loop().call_later(_EVERY_S, self._flush_refused)
        self._refused += 1

    def _flush_refused(self) -> None:
        count, self._refused = self._refused, 0
        self._append({"time": round(time.time(), 3), "code": 429, "requests": count})

    def _append(self, line: dict[str, object]) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(_EVERY_S, self.flush)
        self._lines.append(encode(line))

    def flush(self) -> None:
        """Hand the pending lines to the writing thread."""
        if self._lines:
            data = b"\n".join([*self._lines, b""])
            self._lines.clear()
            if b"\x7f" in data or b"\xc2" in data:
                data = _CONTROLS.sub(_escaped, data)
            self._outlet.put(data)

    def close(self) -> None:
        """Write the pending lines, and wait for it briefly."""
        self.flush()
        self._outlet.close()


def _dropped_line(lines: int) -> bytes:
    return encode({"time": round(time.time(), 3), "dropped": lines}) + b"\n"


def _escaped(control: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(control[0].decode())
