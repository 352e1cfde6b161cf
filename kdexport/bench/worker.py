"""One round of one variant, in a process of its own: `python -m kdexport.bench.worker`, JSON in and out."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from kdexport.bench.targets import Opened, Target, open_target

_now = time.perf_counter_ns


class Job(msgspec.Struct, frozen=True):
    """What to measure; `rows` is a JSON file of rows that are answered in turn."""

    target: Target
    rows: str
    threads: int
    seconds: float
    min_samples: int
    max_seconds: float
    start: int


class Samples(msgspec.Struct, frozen=True):
    """Microseconds a row: tokenising, the model's run, and all from text to answer."""

    tokenize_us: list[float]
    model_us: list[float]
    total_us: list[float]


def measure(job: Job) -> Samples:
    """Warm up, then answer rows one at a time until time and number of samples are reached."""
    rows = msgspec.json.decode(Path(job.rows).read_bytes())
    opened = open_target(job.target, job.threads)
    _loop(opened, rows, job.start, seconds=min(0.3, job.seconds), min_samples=10, max_seconds=job.max_seconds)
    gc.collect()
    gc.freeze()
    gc.disable()
    return _loop(opened, rows, job.start, job.seconds, job.min_samples, job.max_seconds)


def _loop(
    opened: Opened,
    rows: list[dict[str, Any]],
    start: int,
    seconds: float,
    min_samples: int,
    max_seconds: float,
) -> Samples:
    task, run = opened
    tokenize, model, total = [], [], []
    begun, i = _now(), start
    while True:
        row = rows[i % len(rows)]
        t0 = _now()
        arrays = task.encode([row])
        t1 = _now()
        logits = run(arrays)
        t2 = _now()
        task.decode(logits)
        t3 = _now()
        tokenize.append((t1 - t0) / 1e3)
        model.append((t2 - t1) / 1e3)
        total.append((t3 - t0) / 1e3)
        i += 1
        spent = (t3 - begun) / 1e9
        if (spent >= seconds and len(total) >= min_samples) or spent >= max_seconds:
            return Samples(tokenize, model, total)


def main() -> None:
    """Read a job from stdin, write its samples to stdout."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(measure(job)))


if __name__ == "__main__":
    main()
