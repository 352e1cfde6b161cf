"""Subprocesses of our modules: JSON in and out, threads pinned; they end with their parent."""

import contextlib
import ctypes
import errno
import os
import re
import runpy
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


class Crashed(Exception):
    """A target stopped, or hung, while it was measured."""


def call(module: str, job: bytes, threads: int, deadline_s: float = 600.0) -> bytes:
    """Run a module in a subprocess, with every library's threads pinned.

    Raises:
        Crashed: it stopped, or was killed at the deadline.
    """
    pinned = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdexport.bench.process", module, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | pinned | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        process_group=0,  # its children are killed with it, and can't hold its pipes open
    )
    try:
        out, errors = process.communicate(job, deadline_s)
    except BaseException as stopped:  # Ctrl-C too
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        if isinstance(stopped, subprocess.TimeoutExpired):
            raise Crashed(f"hung: it was killed after {deadline_s:.0f} s without a result") from None
        raise
    if process.returncode < 0:
        raise Crashed(f"was killed while it was measured ({signal.Signals(-process.returncode).name}; out of memory?)")
    if os.strerror(errno.EMFILE).encode() in errors:  # not of the target: the whole command has too few
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if process.returncode:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise Crashed(f"stopped while it was measured: {re.sub(r'^kdexport[.][a-z.]*[A-Za-z]+: ', '', reason)}")
    return out


def main() -> None:
    """Run a module as `python -m` does, until it or the parent process ends."""
    module, parent = sys.argv[1:]
    with contextlib.suppress(OSError, AttributeError):  # Linux alone; a watching thread would be measured too
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before that
        raise SystemExit(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
