"""Our modules in processes of their own: JSON in, JSON out, threads pinned."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys


class Crashed(Exception):
    """A target stopped while it was measured."""


def call(module: str, job: bytes, threads: int) -> bytes:
    """Run one of our modules in a process of its own, with every library's threads pinned.

    Raises:
        Crashed: it stopped; the message says why.
    """
    pinned = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    done = subprocess.run(
        [sys.executable, "-m", module],
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
