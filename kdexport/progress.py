"""Progress bars on a terminal, plain lines elsewhere, all on stderr; results go to stdout.

`say` and `warn` never raise, whatever stderr is, and in a server they never wait.
"""

import io
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from queue import SimpleQueue
from typing import Any, cast

from rich.console import Console

_PLAIN_LINE_EVERY_S = 15.0
_MOST_WAITING = 4 * 1024 * 1024  # bytes; more are dropped


class Outlet:
    """A file descriptor written by a thread, so that a slow reader blocks nobody.

    `note` renders the number of dropped lines as the line that replaces them; `on_dropped` is called with the number
    just dropped, on the caller's thread or the writer's.
    """

    def __init__(
        self,
        fd: int,
        note: Callable[[int], bytes] = lambda lines: b"%d lines were dropped, as nobody read them\n" % lines,
        on_dropped: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._fd, self._note, self._on_dropped = fd, note, on_dropped
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._waiting = self._dropped = 0
        self._torn = False  # whether the last line is there in part
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, data: bytes) -> None:
        """Queue whole lines, or drop them when too many wait."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
                self._thread.start()
            full = self._waiting + len(data) > _MOST_WAITING
            if not full:
                self._waiting += len(data)
                self._queue.put(data)
        if full:
            self._drop(data)

    def close(self, timeout: float = 1.0) -> None:
        """Wait until everything is written, or for the timeout."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            if dropped and self._write(self._note(dropped)):
                with self._lock:
                    self._dropped += dropped
            if left := self._write(data):  # a full disk may have room again for the next ones
                self._drop(left)
            with self._lock:
                self._waiting -= len(data)

    def _drop(self, data: bytes) -> None:
        lines = data.count(b"\n") or 1
        with self._lock:
            self._dropped += lines
        self._on_dropped(lines)

    def _write(self, data: bytes) -> bytes:
        """Write as much as possible; return the rest."""
        left = memoryview(b"\n" + data if self._torn else data)
        try:
            while left:
                try:
                    written = os.write(self._fd, left)
                    self._torn = left[written - 1] != ord("\n")
                    left = left[written:]
                except BlockingIOError:  # a pipe that another program has set so
                    select.select([], [self._fd], [])
        except (OSError, ValueError):
            pass
        return bytes(left)


class _Stderr(io.TextIOBase):
    """The current stderr without errors; with an outlet, also without waiting."""

    def __init__(self, outlet: Outlet | None = None) -> None:
        self._outlet = outlet

    def write(self, text: str) -> int:
        if self._outlet:
            self._outlet.put(text.encode(errors="backslashreplace"))
        elif sys.stderr is not None:
            with suppress(OSError, ValueError):  # a closed pipe, a full disk, a closed file
                sys.stderr.write(text)
                sys.stderr.flush()
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(2) if self._outlet else sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def unwaiting_stderr() -> Iterator[None]:
    """Let no line that Python writes to stderr wait for its reader: for a server."""
    before, outlet = sys.stderr, Outlet(2)
    sys.stderr = _Stderr(outlet)
    try:
        yield
    finally:
        sys.stderr = before
        outlet.close()


@cache
def console() -> Console:
    """The console on stderr."""
    return Console(file=cast(Any, _Stderr()), highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """Print one event."""
    console().print(text, style=style, markup=False)


def warn(text: str) -> None:
    """Print one warning."""
    console().print(f"warning: {text}", style="yellow", markup=False)


def bar(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of `total` units of work; yield a callback for units just done.

    On a terminal this is a bar with the time left; elsewhere (logs, CI) a line every 15 s.
    """
    return _live_bar(title, total) if console().is_terminal else _plain_lines(title, total)


@contextmanager
def _live_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as painter:
        task = painter.add_task(title, total=total)
        yield lambda done: painter.update(task, advance=done)


@contextmanager
def _plain_lines(title: str, total: int) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    finished = 0

    def advance(done: int) -> None:
        nonlocal finished, last
        finished += done
        now = time.monotonic()
        if now - last >= _PLAIN_LINE_EVERY_S and 0 < finished < total:
            last = now
            left = (now - started) / finished * (total - finished)
            say(f"  {title}: {finished:,} of {total:,}, about {left:.0f} s left")

    yield advance
