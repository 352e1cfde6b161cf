"""Our modules in processes of their own: JSON in, JSON out, threads pinned, gone when the process that asked is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import runpy
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


class Crashed(Exception):
    """A target stopped while it was measured."""


def call(module: str, job: bytes, threads: int) -> bytes:
    """Run one of our modules in a process of its own, with every library's threads pinned.

    Raises:
        Crashed: it stopped; the message says why.
    """
    pinned = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    done = subprocess.run(
        [sys.executable, "-m", "kdexport.bench.process", module, str(os.getpid())],
        input=job,
        capture_output=True,
        env=os.environ | pinned | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode < 0:
        raise Crashed(f"was killed while it was measured ({signal.Signals(-done.returncode).name}; out of memory?)")
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise Crashed(f"stopped while it was measured: {re.sub(r'^kdexport[.][a-z.]*[A-Za-z]+: ', '', reason)}")
    return done.stdout


def main() -> None:
    """Run a module as `python -m` does, until it ends or the process that asked for it does."""
    module, parent = sys.argv[1:]
    with contextlib.suppress(OSError, AttributeError):  # Linux alone; no thread, which would be measured too
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before that
        raise SystemExit(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
