"""The measuring engine: variants take turns in short shuffled rounds, each in a process of its own.

The unit of replication is the round, not the call: identical processes differ by some 10 % on shared
machines, while calls inside one agree with each other. So medians are taken by round, intervals over rounds,
and ratios are paired by round, where drift hits both sides alike.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport import spec
from kdexport.bench.machine import environment
from kdexport.bench.targets import Target
from kdexport.bench.worker import Job, Samples
from kdexport.errors import RunError
from kdexport.progress import bar, say
from kdexport.results import Latency, Ratio
from kdexport.rundir import write_bytes, write_json
from kdexport.tasks.metrics import Array

# Student's t, 97.5 %, by degrees of freedom; beyond the table the normal's is near enough.
_T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)

_MAX_ROWS = 256
_MIN_SAMPLES_A_ROUND = 200
_P99_SAMPLES, _P90_SAMPLES = 1_000, 100


class Measured(msgspec.Struct, frozen=True):
    """`bench.json`: latency by variant, ratios to the reference, and the conditions."""

    latency: dict[str, Latency]
    speedup: dict[str, Ratio]
    round_p50_ms: dict[str, list[float]]
    reference: str
    conditions: dict[str, Any]
    environment: dict[str, Any]


class Round(NamedTuple):
    """Milliseconds of one round of one variant."""

    tokenize: Array
    model: Array
    total: Array


def bench(
    settings: spec.Bench,
    targets: list[Target],
    rows: list[dict[str, Any]],
    reference: str,
    seed: int,
    out: Path,
) -> None:
    """Measure targets side by side and write `bench.json` and every sample (`samples.npz`).

    Args:
        settings: threads, rounds and seconds.
        targets: what to measure.
        rows: real rows; up to 256 of them, spread over all, are answered one at a time, in one order for all.
        reference: the target that ratios are taken to.
        seed: of the order of rows and turns.
        out: an existing folder.
    """
    chosen = random.Random(seed).sample(rows, min(_MAX_ROWS, len(rows)))
    write_bytes(out / "rows.json", msgspec.json.encode(chosen))
    facts = environment()
    rounds: dict[str, list[Round]] = {target.name: [] for target in targets}
    with bar("measure", settings.rounds * len(targets)) as advance:
        for number in range(settings.rounds):
            turns = random.Random(f"{seed}:{number}").sample(targets, len(targets))
            for target in turns:
                rounds[target.name].append(_round(target, out / "rows.json", settings, number))
                advance(1)
    (out / "rows.json").unlink()
    medians = {name: [float(np.median(one.total)) for one in found] for name, found in rounds.items()}
    conditions = {
        "batch_size": 1,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "round_seconds": settings.round_seconds,
        "rows": len(chosen),
        "spinning": False,
        "clock": "text to answer: tokenise, run, softmax",
    }
    measured = Measured(
        latency={name: _latency(found) for name, found in rounds.items()},
        speedup={name: ratio(medians[reference], found) for name, found in medians.items()},
        round_p50_ms=medians,
        reference=reference,
        conditions=conditions,
        environment=facts,
    )
    samples: dict[str, Any] = {
        f"{name}/{i}": one.total.astype(np.float32) for name, found in rounds.items() for i, one in enumerate(found)
    }
    np.savez_compressed(out / "samples.npz", **samples)
    write_json(out / "bench.json", measured)
    say(f"bench: {settings.rounds} rounds, {settings.threads} thread(s), batch 1, {len(chosen)} real texts in turn")


def read_measured(folder: Path) -> Measured:
    """`bench.json` of a finished bench stage."""
    return msgspec.json.decode((folder / "bench.json").read_bytes(), type=Measured)


def ratio(reference: list[float], other: list[float]) -> Ratio:
    """How many times faster `other` is: reference ÷ other, by the medians of paired rounds, in ms."""
    logs = np.log(reference) - np.log(other)
    centre, half = float(np.mean(logs)), _half_width(logs)
    return Ratio(math.exp(centre), (math.exp(centre - half), math.exp(centre + half)))


def _latency(rounds: list[Round]) -> Latency:
    medians = np.array([np.median(r.total) for r in rounds])
    logs = np.log(medians)
    centre, half = float(np.mean(logs)), _half_width(logs)
    samples = np.concatenate([r.total for r in rounds])
    return Latency(
        p50=float(np.median(medians)),
        p90=_quantile(samples, 0.90, _P90_SAMPLES),
        p99=_quantile(samples, 0.99, _P99_SAMPLES),
        p50_ci95=(math.exp(centre - half), math.exp(centre + half)),
        tokenize_p50=float(np.median([np.median(r.tokenize) for r in rounds])),
        model_p50=float(np.median([np.median(r.model) for r in rounds])),
        samples=len(samples),
        rounds=len(rounds),
    )


def _quantile(samples: Array, q: float, enough: int) -> float | None:
    return float(np.quantile(samples, q, method="higher")) if len(samples) >= enough else None


def _half_width(logs: Array) -> float:
    """Half of the 95 % interval of the mean, by Student's t over rounds."""
    freedom = len(logs) - 1
    t = _T975[freedom - 1] if freedom <= len(_T975) else 1.96
    return t * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))


def _round(target: Target, rows: Path, settings: spec.Bench, number: int) -> Round:
    job = Job(
        target=target,
        rows=str(rows),
        threads=settings.threads,
        seconds=settings.round_seconds,
        min_samples=_MIN_SAMPLES_A_ROUND,
        max_seconds=3 * settings.round_seconds,
        start=number * 37,  # each round begins at another row, so that slow variants see all of them
    )
    threads = str(settings.threads)
    pinned = {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    found = subprocess.run(
        [sys.executable, "-m", "kdexport.bench.worker"],
        input=msgspec.json.encode(job),
        capture_output=True,
        env=os.environ | pinned | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if found.returncode:
        reason = found.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RunError(f"{target.name} stopped while it was measured: {' '.join(reason)}", "Run it again")
    samples = msgspec.json.decode(found.stdout, type=Samples)
    return Round(*(np.array(x) / 1e3 for x in (samples.tokenize_us, samples.model_us, samples.total_us)))
