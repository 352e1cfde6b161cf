"""The measuring engine: variants take turns in short shuffled rounds, each in its own process.

Rounds are added until every ratio is precise enough or the time is up. One target is measured twice, as two: the
ratio of that pair checks the engine itself.
"""

import hashlib
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport import spec
from kdexport.bench import recordings, stats, warnings
from kdexport.bench.loads import Loads, put_loads
from kdexport.bench.machine import environment
from kdexport.bench.process import Crashed, call
from kdexport.bench.subjects import Target, measured_tokens, why_not
from kdexport.bench.worker import Round, Samples
from kdexport.errors import RunError, counted
from kdexport.files import digest, write_bytes, write_json
from kdexport.progress import bar, say, warn
from kdexport.results import QUANTILES, Cell, Conditions, Control, Footprint, Latency, Ratio
from kdexport.tasks import load_task
from kdexport.tasks.config import Row
from kdexport.tasks.metrics import Array

_MAX_ROWS, _MAX_ROUNDS = 256, 100
_SWEEP_ROUNDS = 3
_SHOWN = (5, 50, 95, 100)  # percentiles of the rows' lengths
_CLOCKS = ("text to answer: tokenise, run, softmax", "recording to answer: features, run, decode")
GRACE_S = 600.0  # for loading, compiling and sweeping, beside the measured time
# Optional stopping at the first narrow interval stops too early too often, so the level is higher than 95 %.
_STOP_LEVEL = 0.98
AGAIN = " again"

Rounds = dict[int, Samples]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """`bench.json`: results by variant; `targets` are all requested ones."""

    targets: list[Target] = []
    latency: dict[str, Latency]
    speedup: dict[str, Ratio]
    speedup_p99: dict[str, Ratio]
    footprint: dict[str, Footprint]
    cells: dict[str, list[Cell]]
    conditions: Conditions
    environment: dict[str, Any]


def bench(
    settings: spec.Bench,
    targets: list[Target],
    rows: Sequence[Row],
    reference: str,
    seed: int,
    out: Path,
    *,
    control: str | None = None,
    loads: Loads | None = None,
    sweep: bool = True,
) -> Measured:
    """Measure targets side by side; write `bench.json` and every sample (`samples.npz`, ms) into the folder `out`.

    All targets process the same sample of up to 256 rows one at a time, in one order. Ratios are relative to
    `reference`, `control` is measured twice, `loads` are put on HTTP targets, `sweep` adds batches and lengths.

    Raises:
        RunError: no target could be measured. A single crash is recorded in the result instead.
    """
    chosen = random.Random(seed).sample(rows, min(_MAX_ROWS, len(rows)))
    left_out = {target.name: reason for target in targets if (reason := why_not(target))}
    for name, reason in left_out.items():
        warn(f"bench: {name} is left out: {reason}")
    active = [target for target in targets if target.name not in left_out]
    twin = f"{control}{AGAIN}"
    in_turns = active + [msgspec.structs.replace(t, name=twin) for t in active if t.name == control]
    facts, started = environment(), time.monotonic()
    write_bytes(out / "rows.json", msgspec.json.encode(chosen))
    # Complete rounds stay on disk until the end, named by a hash of the request, so that the same call resumes.
    asked = digest(msgspec.to_builtins([settings, in_turns, reference, seed, chosen, sweep]))
    saved = out / f"rounds-{asked[:12]}"
    saved.mkdir(exist_ok=True)
    found, failed = _take_turns(settings, in_turns, reference, seed, out / "rows.json", saved, sweep)
    own = {name: rounds for name, rounds in found.items() if name != twin}
    durations = recordings.durations_of(next((t for t in active if t.task), None), chosen)
    cells = {name: _cells(rounds) + recordings.by_duration(rounds, durations) for name, rounds in own.items()}
    alive = [t for t in active if t.name in own]
    _other_threads(settings, alive, out / "rows.json", cells, started + settings.time_limit_s)
    for target in alive:
        if target.runtime == "http" and loads:
            put, trouble = put_loads(target, loads, seed, out / "rows.json")
            cells[target.name] += put
            if trouble:
                failed[target.name] = trouble
                warn(f"bench: {target.name} {trouble}")
    (out / "rows.json").unlink()
    shutil.rmtree(saved)
    if not own:
        reasons = "; ".join(f"{name} {why}" for name, why in (failed or left_out).items())
        raise RunError(f"nothing could be measured: {reasons}", "kdexport doctor says what this machine has")
    base, again = own.get(reference, {}), found.get(twin)
    new_tokens = max((measured_tokens(load_task(Path(target.task))) for target in active if target.task), default=0)
    p99 = {name: stats.pooled_ratio(*_totals(base, rounds), 0.99) for name, rounds in own.items()} if base else {}
    clock = f"a prompt of at most {new_tokens} tokens to {new_tokens} more" if new_tokens else _CLOCKS[any(durations)]
    conditions = Conditions(
        reference=reference, threads=settings.threads[0], rounds=max(map(len, own.values())),
        round_seconds=settings.round_seconds, rows=len(chosen),
        texts=hashlib.sha256(msgspec.json.encode(chosen)).hexdigest()[:12],
        tokens=_tokens(next((t for t in active if t.task), None), chosen),
        durations={f"p{q}": round(float(np.percentile(durations, q)), 3) for q in _SHOWN} if len(durations) else {},
        clock=clock, seconds=round(time.monotonic() - started, 1), failed=failed, left_out=left_out,
        control=Control(str(control), _ratio(own[str(control)], again)) if again and control in own else None,
        price_per_hour=settings.price_per_hour,
    )  # fmt: skip
    measured = Measured(
        targets=targets, conditions=conditions, environment=facts,
        latency={name: _latency(rounds, new_tokens, durations) for name, rounds in own.items()},
        speedup={name: _ratio(base, rounds) for name, rounds in own.items()} if base else {},
        speedup_p99={name: ratio for name, ratio in p99.items() if ratio},
        footprint={t.name: _footprint(own[t.name]) for t in alive if t.runtime != "http"}, cells=cells,
    )  # fmt: skip
    conditions.warnings.extend(warnings.of(settings, found, measured, facts))
    samples = {f"{name}/{i}": _total(one).astype(np.float32) for name, r in found.items() for i, one in r.items()}
    np.savez_compressed(out / "samples.npz", **samples)  # type: ignore[arg-type] # numpy's stub wants no names
    write_json(out / "bench.json", measured)
    say(
        f"bench: {counted(conditions.rounds, 'round')}, {counted(settings.threads[0], 'thread')}, "
        f"{counted(len(chosen), 'real row')} in turn"
    )
    return measured


def read_measured(folder: Path) -> Measured:
    """Read `bench.json` of a finished bench stage."""
    return msgspec.json.decode((folder / "bench.json").read_bytes(), type=Measured)


def read_rounds(folder: Path, name: str) -> list[Array]:
    """Read a variant's samples (ms) from `samples.npz`, one array per round."""
    with np.load(folder / "samples.npz") as samples:
        return [samples[key] for key in samples.files if key.rpartition("/")[0] == name]


def _take_turns(
    settings: spec.Bench, targets: list[Target], reference: str, seed: int, rows: Path, saved: Path, sweep: bool
) -> tuple[dict[str, Rounds], dict[str, str]]:
    """Return the rounds by target, and the reasons of failures."""
    found: dict[str, Rounds] = {}
    failed: dict[str, str] = {}
    started, longest = time.monotonic(), 0.0
    with bar("measure", settings.rounds * len(targets)) as advance:
        for number in range(_MAX_ROUNDS):
            file = saved / f"{number}.json"
            if file.exists():
                before = msgspec.json.decode(file.read_bytes(), type=dict[str, Samples])
                for name, samples in before.items():
                    found.setdefault(name, {})[number] = samples
                say(f"  measure: round {number + 1} was measured before")
                advance(len(before))
                continue
            alive = [t for t in targets if t.name not in failed]
            begun = time.monotonic()
            late = begun - started + longest > settings.time_limit_s
            wanted = alive if number < settings.rounds else _unsure(settings, alive, found, reference)
            if not wanted or (number and late):
                break
            if number == settings.rounds:
                say("  measure: some ratios are not known well enough yet; more rounds")
            for target in random.Random(f"{seed}:{number}").sample(wanted, len(wanted)):
                try:
                    found.setdefault(target.name, {})[number] = _round(settings, target, rows, number, sweep=sweep)
                except Crashed as crash:
                    failed[target.name] = str(crash)
                    warn(f"bench: {target.name} {crash}")
                advance(number < settings.rounds)
            whole = {name: rounds[number] for name, rounds in found.items() if number in rounds}
            write_bytes(file, msgspec.json.encode(whole))
            longest = max(longest, time.monotonic() - begun)
    return {name: rounds for name, rounds in found.items() if rounds and name not in failed}, failed


def _unsure(settings: spec.Bench, alive: list[Target], found: dict[str, Rounds], reference: str) -> list[Target]:
    """Return the targets whose ratio is not precise enough yet, with the reference; none when all are."""
    if settings.precision is None or reference not in found:
        return []
    ratios = {t.name: _ratio(found[reference], found[t.name], _STOP_LEVEL).ci95 for t in alive if t.name != reference}
    unsure = {name for name, ci in ratios.items() if stats.half_width(ci) > settings.precision}
    return [t for t in alive if t.name in unsure | {reference}] if unsure else []


def _round(
    settings: spec.Bench, target: Target, rows: Path, number: int, *, sweep: bool, threads: int | None = None
) -> Samples:
    sweep = sweep and number < _SWEEP_ROUNDS and not target.name.endswith(AGAIN)
    threads = threads or settings.threads[0]
    task = load_task(Path(target.task)) if target.task else None
    # Language models write one text at a time.
    batches = sweep and not (task and (task.alone or measured_tokens(task)))
    job = Round(
        target=target, rows=str(rows), threads=threads, seconds=settings.round_seconds, spawned_ns=time.monotonic_ns(),
        start=recordings.start_of(number),
        batch_sizes=[size for size in settings.batch_sizes if size > 1] if batches else [],
        lengths=task.lengths() if task and sweep and target.runtime != "http" else [],
    )  # fmt: skip
    done = call("kdexport.bench.worker", msgspec.json.encode(job), threads, GRACE_S + 10 * settings.round_seconds)
    return msgspec.json.decode(done, type=Samples)


def _latency(rounds: Rounds, new_tokens: int, durations: Array) -> Latency:
    every = list(rounds.values())
    totals = [_total(one) for one in every]
    pooled = np.concatenate(totals)
    medians = [_median(total) for total in totals]
    p50, p50_ci = stats.estimate(medians)
    factor, factor_ci = recordings.real_time_factor(rounds, durations)
    firsts = [_median(one.first_ms) for one in every if one.first_ms]
    written = {"tokens_per_second": 1e3 * new_tokens / p50} if new_tokens else recordings.parts(every)
    (p90, p90_ci), (p99, p99_ci) = stats.pooled(totals, 0.90), stats.pooled(totals, 0.99)
    return Latency(
        p50=p50, p50_ci95=p50_ci, p90=p90, p90_ci95=p90_ci, p99=p99, p99_ci95=p99_ci,
        p99_at_most=stats.at_most(totals, 0.99) if p99 is None else None,
        tokenize_p50=_median(_median(one.tokenize_us) for one in every) / 1e3,
        model_p50=_median(_median(one.model_us) for one in every) / 1e3,
        first_token_p50=_median(firsts) if firsts else None, samples=len(pooled), rounds=len(every),
        real_time_factor=factor, real_time_factor_ci95=factor_ci,
        round_p50=medians, quantiles=np.quantile(pooled, QUANTILES, method="higher").tolist(), **written,
    )  # fmt: skip


def _footprint(rounds: Rounds) -> Footprint:
    every = list(rounds.values())
    device = [ms for one in every for ms in one.device_ms]
    gpu = [one.gpu_peak_mb for one in every if one.gpu_peak_mb is not None]
    return Footprint(
        cold_ms=_median(one.cold_ms for one in every), cold_ms_ci95=stats.estimate([one.cold_ms for one in every])[1],
        rss_mb=_median(one.rss_mb for one in every), rss_mb_ci95=stats.estimate([one.rss_mb for one in every])[1],
        peak_rss_mb=_median(one.peak_rss_mb for one in every), gpu_peak_mb=max(gpu, default=None),
        device_p50_ms=_median(device) if device else None, cores_used=_median(one.cores_used for one in every),
        os_threads=int(max(one.os_threads for one in every)),
    )  # fmt: skip


def _cells(rounds: Rounds) -> list[Cell]:
    swept = [one for one in rounds.values() if one.batches or one.runs]
    if not swept:
        return []
    by_size = [stats.cell("batch", n, [one.batches[n] for one in swept], n) for n in swept[0].batches]
    return by_size + [stats.cell("length", n, [one.runs[n] for one in swept], None) for n in swept[0].runs]


def _other_threads(
    settings: spec.Bench, targets: list[Target], rows: Path, cells: dict[str, list[Cell]], until: float
) -> None:
    """Measure the single stream with other thread counts, in three rounds; in one when time is up."""
    jobs = [(t, n) for t in targets for n in settings.threads[1:] if t.runtime != "http"]
    found: dict[tuple[str, int], list[list[float]]] = {}
    with bar("other threads", _SWEEP_ROUNDS * len(jobs)) as advance:
        for number in range(_SWEEP_ROUNDS if jobs else 0):
            if number and time.monotonic() > until:
                break
            for target, n in random.Random(number).sample(jobs, len(jobs)):
                try:
                    times = _total(_round(settings, target, rows, number, sweep=False, threads=n)).tolist()
                    found.setdefault((target.name, n), []).append(times)
                except Crashed as crash:
                    warn(f"bench: {target.name} with {n} threads {crash}")
                advance(1)
    for (name, n), times in found.items():
        cells[name].append(stats.cell("threads", n, times, 1))


def _ratio(reference: Rounds, other: Rounds, level: float = 0.95) -> Ratio:
    ours, theirs = (list(map(_median, side)) for side in _totals(reference, other))
    return stats.ratio(ours, theirs, level)


def _totals(reference: Rounds, other: Rounds) -> tuple[list[Array], list[Array]]:
    both = [number for number in reference if number in other]
    return [_total(reference[i]) for i in both], [_total(other[i]) for i in both]


def _total(samples: Samples) -> Array:
    return np.array(samples.total_us) / 1e3


def _tokens(target: Target | None, rows: Sequence[Row]) -> dict[str, int]:
    task = load_task(Path(target.task)) if target else None
    if task is None or not task.lengths():
        return {}
    lengths = np.array(task.sizes(task.tokenize(rows)))
    found = {f"p{q}": int(np.percentile(lengths, q)) for q in _SHOWN}
    limit = max(task.lengths())
    return found | {"limit": limit, "cut_percent": round(100 * float((lengths >= limit).mean()))}


def _median(values: Any) -> float:
    return float(np.median(list(values)))
