"""The only painter: progress bars on a terminal, plain lines elsewhere; all of it on stderr.

Results go to stdout (cli.py), so `kdexport … --json | jq` works while a person watches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console

_PLAIN_LINE_EVERY_S = 15.0


@cache
def console() -> Console:
    """The console on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """Tell the user one thing that happened."""
    console().print(text, style=style, markup=False)


def warn(text: str) -> None:
    """Tell the user one thing that needs a look."""
    console().print(f"warning: {text}", style="yellow", markup=False)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` units of work; call what it yields with the units just done.

    On a terminal this is a bar with the time left; elsewhere (logs, CI) a line every 15 s.
    """
    painter = _live_bar if console().is_terminal else _plain_lines
    with painter(title, total) as advance:
        yield advance


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
