"""The best student that fits a budget: measure all untrained, drop what can't fit, try the rest, train the best.

A student's size and latency don't depend on its weights. So every rung of the ladder is built, exported and
measured before anything is trained, and what is over budget costs no training. The rest is trained for a short
while, which tells who is promising better than any rule; then the most promising is trained in full, and the next
one only if the budget is still not met. All is decided on the validation split: the test split judges the winner.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport import spec
from kdexport.bench.engine import bench
from kdexport.bench.subjects import Target, of_file, of_model
from kdexport.data import read_rows
from kdexport.distill.teachers import kind_of_first
from kdexport.errors import ModelError
from kdexport.export import Candidate, export_student, read_candidates
from kdexport.files import write_json
from kdexport.progress import say, warn
from kdexport.results import Rung, Search
from kdexport.runtime.predictor import Predictor
from kdexport.stages import read_record
from kdexport.tasks import judging, load_task

# Of the examples that a transformer's whole training sees; all students are tried on as many.
TRIAL_SHARE = 0.05
# Epochs without a better validation metric after which a student in a search is done; its best epoch stands.
PATIENCE = 4
# With no limit on latency and size the quickest student comes first that its trial puts this near the best one.
_NEAR_THE_BEST = 0.05

Build = Callable[[str, Path], None]
Train = Callable[[str], tuple[Path, Path]]


def slug(student: str) -> str:
    """A student's name as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9+]+", "-", student).strip("-")


def measure_ladder(
    settings: spec.Spec, students: Sequence[str], build: Build, teacher: Path, rows: list[dict[str, Any]], out: Path
) -> None:
    """Build every student with first weights, export and measure it; write `ladder.json`, a list of `Rung`.

    Args:
        settings: bench and export are read.
        students: names as in the spec.
        build: writes an untrained student into a folder.
        teacher: a model folder; latencies are measured beside it.
        rows: real rows to measure on.
        out: an existing folder.

    Raises:
        ModelError: none of them can be built; one that can't is left out, and said.
    """
    targets = teacher_targets(teacher, ["torch", "onnxruntime"], ["cpu"])
    reference = targets[0].name if targets else None
    files: dict[str, list[tuple[str, Candidate]]] = {}
    refused: ModelError | None = None
    for name in students:
        folder = out / slug(name)
        (folder / "export").mkdir(parents=True, exist_ok=True)
        try:
            build(name, folder)
        except ModelError as error:  # say, more layers than the teacher has
            warn(f"search: {name} is left out: {error}")
            refused = error
            shutil.rmtree(folder)
            continue
        export_student(settings.export, folder, folder / "export", rows)
        found = [c for c in read_candidates(folder / "export") if c.precision == _shipped_precision(settings)]
        files[name] = [(f"{slug(name)}-{c.name}", c) for c in found]
        for label, candidate in files[name]:
            targets += of_file(label, folder, folder / "export" / candidate.file, ["onnxruntime"], ["cpu"])
    if refused and not files:
        raise refused
    how = msgspec.structs.replace(
        settings.bench, rounds=2, round_seconds=0.5, precision=None, threads=settings.bench.threads[:1], batch_sizes=()
    )
    measured = bench(how, targets, rows, targets[0].name, settings.seed, out, sweep=False)
    teacher_latency = measured.latency.get(reference) if reference else None
    rungs = []
    for name, labels in files.items():
        folder = out / slug(name)
        alive = [one for one in labels if one[0] in measured.latency]
        if not alive:
            warn(f"search: {name} is left out: its file could not be measured")
            continue
        label, candidate = min(alive, key=lambda one: measured.latency[one[0]].p50)
        latency = measured.latency[label]
        rung = Rung(
            name=name,
            parameters=msgspec.json.decode((folder / "untrained.json").read_bytes())["parameters"],
            precision=candidate.precision,
            size_bytes=(folder / "export" / candidate.file).stat().st_size,
            p50_ms=latency.p50,
            p99_ms=latency.p99 or latency.p99_at_most,
        )
        rungs.append(rung)
        shutil.rmtree(folder)
    write_json(out / "ladder.json", _Ladder(rungs, teacher_latency.p50 if teacher_latency else None))


def teacher_targets(teacher: Path, runtimes: Sequence[str], devices: Sequence[str]) -> list[Target]:
    """What can be measured of a finished teacher stage: the model in PyTorch, its ONNX file, or nothing."""
    match kind_of_first(teacher):
        case "torch":
            return of_model("teacher", teacher, runtimes, devices)
        case "onnx":
            return of_file("teacher-fp32", teacher, teacher / "model.onnx", ["onnxruntime"], ["cpu"])
        case "stored":
            return []


def over(rung: Rung, budget: spec.Budget) -> str:
    """Which limits a rung breaks before it is trained, in words; empty if none."""
    broken = []
    if budget.size_mb is not None and rung.size_bytes / 1e6 > budget.size_mb:
        broken.append(f"{rung.size_bytes / 1e6:.2f} MB of {budget.size_mb:g}")
    if budget.p99_ms is not None and (rung.p99_ms is None or rung.p99_ms > budget.p99_ms):
        broken.append(f"p99 {_ms(rung.p99_ms)} of {budget.p99_ms:g}")
    return " and ".join(broken)


def promising(rungs: Sequence[Rung], budget: spec.Budget) -> list[Rung]:
    """The rungs that fit, in the order in which they are trained.

    Where latency or size is limited, any rung that fits will do, so the one with the best trial comes first. Where
    neither is, the budget asks for accuracy alone, and the quickest student that is near the best trial comes first.
    If none fits, the one that is least over the limits is trained, so that the report can show the closest.
    """
    fitting = [rung for rung in rungs if not rung.over]
    if not fitting:
        return [min(rungs, key=lambda rung: _excess(rung, budget))]
    by_trial = sorted(fitting, key=lambda rung: (-(rung.trial or 0.0), rung.p50_ms))
    if budget.p99_ms is not None or budget.size_mb is not None:
        return by_trial
    near = (by_trial[0].trial or 0.0) - _NEAR_THE_BEST
    return sorted(fitting, key=lambda rung: ((rung.trial or 0.0) < near, rung.p50_ms))


class Found(NamedTuple):
    """The winner's stages, and how it was found."""

    student: Path
    export: Path
    search: Search


def climb(
    settings: spec.Spec, rungs: list[Rung], train: Train, data: Path, targets: Path, teacher_p50_ms: float | None
) -> Found:
    """Train the promising students one after the other until the budget is met.

    Args:
        settings: budget and export are read.
        rungs: the ladder, measured and tried.
        train: trains and exports a student; gives both folders. Finished ones are there at once.
        data, targets: finished stages.
        teacher_p50_ms: for the report.
    """
    budget, rows = settings.budget, read_rows(data, "validation")
    teacher = np.load(targets / "validation.npy")
    spent = sum(rung.trial_seconds or 0.0 for rung in rungs)
    trained: dict[str, tuple[Rung, Path, Path]] = {}
    of_teacher = 0.0
    for rung in promising(rungs, budget):
        expected = (rung.trial_seconds or 0.0) / TRIAL_SHARE
        if trained and budget.time_limit_s is not None and spent + expected > budget.time_limit_s:
            warn(f"search: {rung.name} would take {expected:.0f} s more, over the time limit; it is left out")
            continue
        say(f"search: {rung.name} is trained{' next' if trained else ' first'}")
        student, export = train(rung.name)
        seconds = read_record(student).seconds
        spent += seconds
        task = load_task(student)
        labelled = rows[0]["label"] is not None
        of_teacher = judging.metric(task, teacher, rows) if labelled else 1.0
        file = _best_file(settings, export)
        logits = Predictor(task, file).logits(rows)
        metric = judging.metric(task, logits, rows) if labelled else float(task.agrees(logits, teacher).mean())
        kept = metric / of_teacher if of_teacher else 0.0
        met = not rung.over and (budget.retention is None or kept >= budget.retention)
        done = msgspec.structs.replace(rung, metric=metric, retention=kept, seconds=seconds, met=met)
        trained[rung.name] = done, student, export
        say(f"search: {rung.name} keeps {100 * kept:.1f} % of the teacher on validation{'' if met else ', not enough'}")
        if met:
            break
    winner, student, export = max(trained.values(), key=lambda one: (bool(one[0].met), one[0].metric))
    told = [trained[rung.name][0] if rung.name in trained else rung for rung in rungs]
    reason = _reason(winner, told, budget)
    say(f"search: {reason}")
    return Found(
        student,
        export,
        Search(rungs=told, winner=winner.name, reason=reason, teacher=of_teacher, teacher_p50_ms=teacher_p50_ms),
    )


def _reason(winner: Rung, rungs: list[Rung], budget: spec.Budget) -> str:
    dropped = sum(bool(rung.over) for rung in rungs)
    left = f"{dropped} of {len(rungs)} were over budget before any training" if dropped else "all fit the budget"
    done = sum(rung.metric is not None for rung in rungs)
    kept = f"keeps {100 * (winner.retention or 0):.1f} % of the teacher on validation"
    if winner.met:
        return f"{winner.name} {kept}: the budget is met; {left}, {done} trained in full"
    if winner.over:
        return f"no student fits the budget; {winner.name} is the closest ({winner.over}) and {kept}"
    wanted = f", {100 * budget.retention:g} % was asked for" if budget.retention else ""
    return (
        f"no student meets the budget; {winner.name} comes closest and {kept}{wanted}; {left}, {done} trained in full"
    )


def _shipped_precision(settings: spec.Spec) -> str:
    return "int8" if "int8" in settings.export.variants else "fp32"


def _best_file(settings: spec.Spec, export: Path) -> Path:
    wanted = _shipped_precision(settings)
    return next(export / c.file for c in read_candidates(export) if c.precision == wanted and c.graph == "plain")


def _excess(rung: Rung, budget: spec.Budget) -> float:
    """How many times over its worst limit a rung is."""
    found = [rung.size_bytes / 1e6 / budget.size_mb] if budget.size_mb else []
    if budget.p99_ms:
        found.append((rung.p99_ms or float("inf")) / budget.p99_ms)
    return max(found, default=0.0)


def _ms(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f} ms"


def read_ladder(folder: Path, budget: spec.Budget) -> tuple[list[Rung], float | None]:
    """A finished ladder stage held against a budget: the rungs, and the teacher's p50 in ms."""
    found = msgspec.json.decode((folder / "ladder.json").read_bytes(), type=_Ladder)
    rungs = [msgspec.structs.replace(rung, over=over(rung, budget)) for rung in found.rungs]
    for rung in rungs:
        size = f"{rung.size_bytes / 1e6:.2f} MB, p50 {rung.p50_ms:.3f} ms, p99 {_ms(rung.p99_ms)}"
        say(f"  {rung.name}: {size}: {f'over budget, {rung.over}' if rung.over else 'fits'}")
    return rungs, found.teacher_p50_ms


class _Ladder(msgspec.Struct, frozen=True):
    """`ladder.json`."""

    rungs: list[Rung]
    teacher_p50_ms: float | None
