"""The real server in a process of its own, on free loopback ports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Served(NamedTuple):
    """A running server; `log` grows while it runs."""

    url: str
    admin: str
    process: subprocess.Popen[str]
    log: list[str]


@contextmanager
def served(
    *arguments: object,
    code: int | None = 0,
    program: Sequence[str] = ("-m", "kdexport", "serve"),
    output: Any = subprocess.DEVNULL,
    **environment: str,
) -> Iterator[Served]:
    """Serve until the block ends, then SIGTERM; `code` is the exit code that is then expected (None: any).

    `program` is what Python runs, for settings that have no flag; `output` is where stdout goes.
    """
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments), "--port", "0", "--admin-port", "0"],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )
    log: list[str] = []
    try:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"ready after .* on (http://\S+), admin on (http://\S+)", line):
                break
        else:
            raise AssertionError(f"it did not start: {''.join(log)}")
        reader = threading.Thread(target=lambda: log.extend(process.stderr))
        reader.start()
        yield Served(found[1], found[2], process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        found_code = process.wait(timeout=60)
        if "reader" in locals():
            reader.join()
        process.stderr.close()
    if code is not None:
        assert found_code == code, "".join(log)
