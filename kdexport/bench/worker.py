"""One round of a variant, or its logits for all rows, in a subprocess.

`python -m kdexport.bench.worker` reads a JSON job and writes samples as JSON, or logits as a .npy file.
"""

import gc
import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from kdexport.bench.process import call
from kdexport.bench.subjects import Opened, Parts, Rows, Target, open_target
from kdexport.runtime.predictor import allowed_cores
from kdexport.tasks import load_task
from kdexport.tasks.batches import in_batches
from kdexport.tasks.metrics import Array

_now = time.perf_counter_ns
# Least time and runs of a cell; runs of warm-up.
_CELL_SECONDS, _CELL_RUNS, _WARM_RUNS = 0.1, 3, 10
# Least samples of a round, and most time for them, as a multiple of what was asked for.
_SAMPLES, _MOST_TIME = 200, 3


class Round(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A round to measure, over the rows of the JSON file `rows` from `start` on.

    `batch_sizes` and `lengths` (tokens) follow the single stream; `spawned_ns` is the monotonic clock at the spawn.
    """

    target: Target
    rows: str
    threads: int
    seconds: float
    start: int
    batch_sizes: list[int]
    lengths: list[int]
    spawned_ns: int


class Answers(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request for the logits of all rows of a JSON file."""

    target: Target
    rows: str


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """Times per row, resources, and `batches` and `runs` in ms by batch size and by length."""

    tokenize_us: list[float]
    model_us: list[float]
    total_us: list[float]
    device_ms: list[float]
    batches: dict[int, list[float]]
    runs: dict[int, list[float]]
    cold_ms: float
    rss_mb: float
    peak_rss_mb: float
    gpu_peak_mb: float | None
    cores_used: float
    os_threads: int
    first_ms: list[float] = []
    parts: list[Parts] = []


def logits_of(target: Target, rows: Path, deadline_s: float) -> Array:
    """Logits [N, C] of every row, computed in a subprocess.

    Raises:
        Crashed: it crashed, or took longer than the deadline.
    """
    job = msgspec.json.encode(Answers(target=target, rows=str(rows)))
    return np.asarray(np.load(io.BytesIO(call("kdexport.bench.worker", job, allowed_cores(), deadline_s))))


def measure(job: Round) -> Samples:
    """Open the target, warm up, run rows one at a time, then in batches, then at fixed lengths."""
    rows = msgspec.json.decode(Path(job.rows).read_bytes())
    opened = open_target(job.target, job.threads)
    if job.target.slower:
        opened = _slowed(opened, job.target.slower)
    first = [rows[job.start % len(rows)]]
    opened.decode(opened.run(opened.encode(first)), first)
    cold_ms = (time.monotonic_ns() - job.spawned_ns) / 1e6
    process = psutil.Process()
    one_by_one = job.target.runtime == "http" and "text" not in rows[0]  # a request has one image or recording
    _stream(opened, job, rows, min(0.3, job.seconds), _WARM_RUNS)
    opened.device_ms()
    gc.collect()
    gc.freeze()
    gc.disable()
    cpu, wall = time.process_time(), time.perf_counter()
    tokenize, model, total = _stream(opened, job, rows, job.seconds, _SAMPLES).tolist()
    cores_used = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return Samples(
        tokenize_us=tokenize, model_us=model, total_us=total, device_ms=opened.device_ms()[-len(total) :],
        first_ms=opened.first_ms()[-len(total) :], parts=opened.parts()[-len(total) :],
        cold_ms=cold_ms, cores_used=cores_used,
        rss_mb=process.memory_info().rss / 1e6, peak_rss_mb=_peak_rss_mb(process), gpu_peak_mb=opened.gpu_peak_mb(),
        os_threads=process.num_threads(),
        batches={size: _batches(opened, job, rows, size) for size in job.batch_sizes if not one_by_one},
        runs={length: _runs(opened, job, rows, length) for length in job.lengths},
    )  # fmt: skip


def _stream(opened: Opened, job: Round, rows: Rows, seconds: float, samples: int) -> Array:
    """Run rows one at a time until both time and samples are reached; return µs [3, N]: tokenize, model, total."""
    encode, run, decode = opened.encode, opened.run, opened.decode
    times: list[tuple[int, int, int]] = []
    begun, i = _now(), job.start
    while True:
        row = [rows[i % len(rows)]]
        t0 = _now()
        arrays = encode(row)
        t1 = _now()
        logits = run(arrays)
        t2 = _now()
        decode(logits, row)
        t3 = _now()
        times.append((t1 - t0, t2 - t1, t3 - t0))
        i += 1
        spent = (t3 - begun) / 1e9
        if (spent >= seconds and len(times) >= samples) or spent >= _MOST_TIME * job.seconds:
            return np.array(times).T / 1e3


def _batches(opened: Opened, job: Round, rows: Rows, size: int) -> list[float]:
    """Ms per batch of texts of similar length, end to end."""
    ordered = sorted(rows, key=lambda row: len(str(row.get("text", ""))))
    places = max(1, len(ordered) - size)

    def answer(i: int) -> None:
        at = (job.start + 61 * i) % places  # another part of the lengths each time
        batch = ordered[at : at + size]
        batch = (batch * (size // len(batch) + 1))[:size]
        opened.decode(opened.run(opened.encode(batch)), batch)

    return _repeat(answer)


def _runs(opened: Opened, job: Round, rows: Rows, length: int) -> list[float]:
    """Ms per run of the model alone, on real texts joined and cut to one length."""
    task = load_task(Path(job.target.task))
    inputs = [task.sized([*rows[(job.start + 7 * k) % len(rows) :], *rows], length) for k in range(8)]
    run = opened.read or opened.run
    return _repeat(lambda i: run(inputs[i % len(inputs)]))


def _repeat(once: Callable[[int], Any]) -> list[float]:
    once(0)
    found: list[float] = []
    begun = _now()
    while len(found) < _CELL_RUNS or _now() - begun < _CELL_SECONDS * 1e9:
        started = _now()
        once(len(found) + 1)
        found.append((_now() - started) / 1e6)
    return found


def _slowed(opened: Opened, share: float) -> Opened:
    """Add a relative busy wait to every answer."""
    started = _now()

    def encode(rows: Any) -> Any:
        nonlocal started
        started = _now()
        return opened.encode(rows)

    def decode(logits: Any, rows: Any) -> Any:
        answers = opened.decode(logits, rows)
        until = _now() + (_now() - started) * share
        while _now() < until:
            pass
        return answers

    return opened._replace(encode=encode, decode=decode)


def _peak_rss_mb(process: psutil.Process) -> float:
    # /proc has the peak since exec; getrusage would inherit the parent's.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else float(process.memory_info().rss / 1e6)


def main() -> None:
    """Read a job from stdin, write its result to stdout."""
    match msgspec.json.decode(sys.stdin.buffer.read(), type=Round | Answers):
        case Answers() as job:
            rows, opened = msgspec.json.decode(Path(job.rows).read_bytes()), open_target(job.target, allowed_cores())
            found = in_batches(load_task(Path(job.target.task)), rows, opened.answer or opened.run)
            np.save(sys.stdout.buffer, found)
        case Round() as job:
            sys.stdout.buffer.write(msgspec.json.encode(measure(job)))


if __name__ == "__main__":
    main()
