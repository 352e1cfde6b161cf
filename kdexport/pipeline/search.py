"""Search for the best student that fits a budget: measure all untrained, try those that fit, train the best.

Size and latency don't depend on the weights, so every student is built, exported and measured untrained, and those over
budget cost no training. The others are trained for a short trial; then the most promising one is trained in full, and
the next only while the budget is not met. The validation split decides; the test split only judges the winner.
"""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from kdexport import spec
from kdexport.bench.engine import bench
from kdexport.bench.subjects import Target, of_file, of_model
from kdexport.data import read_rows
from kdexport.distill.teachers import kind_of_first
from kdexport.errors import ModelError
from kdexport.export import Candidate, export_student, read_candidates
from kdexport.export.verify import decisive, on_validation
from kdexport.files import write_json
from kdexport.pipeline.choose import lost
from kdexport.pipeline.students import Students, local
from kdexport.progress import say, warn
from kdexport.results import Search, SearchCandidate
from kdexport.runtime.artifact import size_of
from kdexport.runtime.predictor import Predictor
from kdexport.stages import read_record
from kdexport.tasks import class_of, load_task
from kdexport.tasks.config import read_config
from kdexport.tasks.judging import AGREEMENT
from kdexport.tasks.metrics import Metric

_TRIAL_SHARE = 0.05  # of the examples in a transformer's full training; the same number for all students
# Without limits on latency and size, the quickest student whose trial is this close to the best is trained first.
_NEAR_THE_BEST = 0.05


def search(make: Students, names: tuple[str, ...]) -> tuple[Path, Path, Search]:
    """Return the student and export stages of the best of several students, and the record of the search."""
    settings = make.settings
    students = msgspec.structs.replace(settings.student, model=names)
    ladder = make.folder.stage(
        "ladder", version=3, reads=[make.data, make.teacher, make.targets, *local(*names)],
        settings=[names, spec.of_results(students), settings.export.variants, settings.bench.threads[0], settings.seed],
        build=lambda work: _measure_ladder(make, names, work),
    )  # fmt: skip
    candidates, teacher_p50_ms = _read_ladder(ladder, settings.budget)
    fitting = [one for one in candidates if not one.over]
    if len(fitting) > 1:
        say(f"search: {len(fitting)} of {len(candidates)} students fit; each is tried for a short while")
        candidates = [_try(make, one) if one in fitting else one for one in candidates]
    return _climb(make, candidates, teacher_p50_ms)


def slug(student: str) -> str:
    """Slugify a student's name for use in a path."""
    return re.sub(r"[^A-Za-z0-9+]+", "-", student).strip("-")


def _measure_ladder(make: Students, names: Sequence[str], out: Path) -> None:
    """Build, export and measure every student untrained, and the teacher; write `ladder.json`, a candidate a precision.

    Students that can't be built are skipped with a warning, unless none can.
    """
    from kdexport.distill.student import write_untrained

    settings, rows = make.settings, read_rows(make.data, "test")
    places = {"data": make.data, "teacher": make.teacher, "targets": make.targets}
    targets = teacher_targets(make.teacher, ["torch", "onnxruntime"], ["cpu"])
    reference = targets[0].name if targets else ""
    files: dict[str, list[tuple[str, Candidate]]] = {}
    refused: ModelError | None = None
    for name in names:
        folder = out / slug(name)
        (folder / "export").mkdir(parents=True, exist_ok=True)
        try:
            write_untrained(settings.student, name, **places, seed=settings.seed, out=folder)
        except ModelError as error:  # for example, more layers than the teacher has
            warn(f"search: {name} is left out: {error}")
            refused = error
            shutil.rmtree(folder)
            continue
        export_student(settings.export, folder, folder / "export", rows)
        found = [c for c in read_candidates(folder / "export") if c.precision in shippable(settings.export)]
        files[name] = [(f"{slug(name)}-{c.name}", c) for c in found]
        for label, file in files[name]:
            targets += of_file(label, folder, folder / "export" / file.file, ["onnxruntime"], ["cpu"])
    if refused and not files:
        raise refused
    short = {"rounds": 2, "round_seconds": 0.5, "precision": None, "batch_sizes": ()}
    how = msgspec.structs.replace(settings.bench, threads=settings.bench.threads[:1], **short)
    measured = bench(how, targets, rows, targets[0].name, settings.seed, out, sweep=False)
    teacher_latency = measured.latency.get(reference)
    candidates = []
    for name, labels in files.items():
        folder = out / slug(name)
        alive = [(measured.latency[label], file) for label, file in labels if label in measured.latency]
        if not alive:
            warn(f"search: {name} is left out: its files could not be measured")
            continue
        quickest = {file.precision: (latency, file) for latency, file in sorted(alive, key=lambda one: -one[0].p50)}
        parameters = msgspec.json.decode((folder / "untrained.json").read_bytes())["parameters"]
        for precision in (p for p in shippable(settings.export) if p in quickest):
            latency, file = quickest[precision]
            size = size_of(folder / "export" / file.file)
            candidates.append(SearchCandidate(
                name=name, parameters=parameters, precision=precision, size_bytes=size, p50_ms=latency.p50,
                p99_ms=latency.p99 or latency.p99_at_most,
            ))  # fmt: skip
        shutil.rmtree(folder)
    write_json(out / "ladder.json", _Ladder(candidates, teacher_latency.p50 if teacher_latency else None))


def shippable(export: spec.Export) -> tuple[str, ...]:
    """Return the precisions that may be recommended: int8, or else fp32; others if that is over the size limit."""
    return ("int8" if "int8" in export.variants else "fp32", *(p for p in ("fp16", "int4") if p in export.variants))


def teacher_targets(teacher: Path, runtimes: Sequence[str], devices: Sequence[str]) -> list[Target]:
    """Return the targets of a finished teacher stage: the model in PyTorch, its ONNX file, or none."""
    match kind_of_first(teacher):
        case "torch":
            return of_model("teacher", teacher, runtimes, devices)
        case "onnx":
            return of_file("teacher-fp32", teacher, teacher / "model.onnx", ["onnxruntime"], ["cpu"])
        case _:  # logits alone, or a model that reads each text once for each label
            return []


def _against(candidate: SearchCandidate, budget: spec.Budget) -> Iterator[tuple[float, str]]:
    """Yield the untrained student's size and latency as ratios of their limits, if any, and in words."""
    if budget.size_mb is not None:
        size = candidate.size_bytes / 1e6
        yield size / budget.size_mb, f"{size:.2f} MB of {budget.size_mb:g}"
    if budget.p99_ms is not None:
        p99 = candidate.p99_ms
        yield (math.inf if p99 is None else p99) / budget.p99_ms, f"p99 {_ms(p99)} of {budget.p99_ms:g}"


def over(candidate: SearchCandidate, budget: spec.Budget) -> str:
    """Describe the limits that a student exceeds untrained; empty if none."""
    return " and ".join(words for ratio, words in _against(candidate, budget) if ratio > 1)


def promising(
    candidates: Sequence[SearchCandidate], budget: spec.Budget, metric: Metric = AGREEMENT
) -> list[SearchCandidate]:
    """Return the students that fit, in the order of training.

    With a limit on latency or size, the best trial comes first; with none, the quickest student near the best trial.
    If none fits, the closest one is trained, for the report.
    """
    fitting = [one for one in candidates if not one.over]
    if not fitting:
        return [min(candidates, key=lambda one: _excess(one, budget))]
    tried = [one.trial for one in fitting if one.trial is not None]
    if not tried:
        return sorted(fitting, key=lambda one: one.p50_ms)
    best = max(tried, key=lambda trial: metric.gain(0.0, trial))

    def loss(one: SearchCandidate) -> float:
        return math.inf if one.trial is None else lost(metric, best, one.trial)

    if budget.p99_ms is not None or budget.size_mb is not None:
        return sorted(fitting, key=lambda one: (loss(one), one.p50_ms))
    return sorted(fitting, key=lambda one: (loss(one) > _NEAR_THE_BEST, one.p50_ms))


def _try(make: Students, one: SearchCandidate) -> SearchCandidate:
    stage = make.train(one.name, f"trial-{slug(one.name)}", share=_TRIAL_SHARE)
    curve = msgspec.json.decode((stage / "training.json").read_bytes())["curve"]
    return msgspec.structs.replace(one, trial=curve[-1]["validation"], trial_seconds=read_record(stage).seconds)


def _climb(
    make: Students, candidates: list[SearchCandidate], teacher_p50_ms: float | None
) -> tuple[Path, Path, Search]:
    """Train the promising students one after the other until the budget is met."""
    budget, rows = make.settings.budget, read_rows(make.data, "validation")
    taught = np.load(make.targets / "validation.npy")
    metric = decisive(class_of(read_config(make.teacher)), rows)
    spent = sum(one.trial_seconds or 0.0 for one in candidates)
    trained: dict[str, tuple[SearchCandidate, Path, Path]] = {}
    of_teacher = 0.0
    for one in promising(candidates, budget, metric):
        expected = (one.trial_seconds or 0.0) / _TRIAL_SHARE
        if trained and budget.time_limit_s is not None and spent + expected > budget.time_limit_s:
            warn(f"search: {one.name} would take {expected:.0f} s more, over the time limit; it is left out")
            continue
        say(f"search: {one.name} is trained{' next' if trained else ' first'}")
        student, export = make.whole(one.name, f"-{slug(one.name)}")
        seconds = read_record(student).seconds
        spent += seconds
        task = load_task(student)
        of_teacher = on_validation(task, rows, taught, taught)
        file = next(c.file for c in read_candidates(export) if c.precision == one.precision and c.graph == "plain")
        value = on_validation(task, rows, Predictor(task, export / file).logits(rows), taught)
        retention = metric.retention(value, of_teacher)
        met = not one.over and (budget.retention is None or retention >= budget.retention)
        done = msgspec.structs.replace(one, metric=value, retention=retention, seconds=seconds, met=met)
        trained[one.name] = done, student, export
        say(f"search: {one.name} {_keeps(done)}{'' if met else ', not enough'}")
        if met:
            break
    winner, student, export = max(trained.values(), key=lambda one: (bool(one[0].met), one[0].retention))
    every = [trained[one.name][0] if one.name in trained else one for one in candidates]
    reason = _reason(winner, every, budget)
    say(f"search: {reason}")
    record = Search(rungs=every, winner=winner.name, reason=reason, teacher=of_teacher, teacher_p50_ms=teacher_p50_ms)
    return student, export, record


def _reason(winner: SearchCandidate, candidates: list[SearchCandidate], budget: spec.Budget) -> str:
    dropped = sum(bool(one.over) for one in candidates)
    left = f"{dropped} of {len(candidates)} were over budget before any training" if dropped else "all fit the budget"
    left += f", {sum(one.metric is not None for one in candidates)} trained in full"
    if winner.met:
        return f"{winner.name} {_keeps(winner)}: the budget is met; {left}"
    if winner.over:
        return f"no student fits the budget; {winner.name} is the closest ({winner.over}) and {_keeps(winner)}"
    wanted = f", {100 * budget.retention:g} % was asked for" if budget.retention else ""
    return f"no student meets the budget; {winner.name} comes closest and {_keeps(winner)}{wanted}; {left}"


def _keeps(candidate: SearchCandidate) -> str:
    return f"keeps {100 * (candidate.retention or 0):.1f} % of the teacher on validation"


def _excess(candidate: SearchCandidate, budget: spec.Budget) -> float:
    return max((ratio for ratio, _ in _against(candidate, budget)), default=0.0)


def _ms(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f} ms"


def _read_ladder(folder: Path, budget: spec.Budget) -> tuple[list[SearchCandidate], float | None]:
    """Read a finished ladder stage: a candidate a student, checked against the budget, and the teacher's p50 in ms."""
    found = msgspec.json.decode((folder / "ladder.json").read_bytes(), type=_Ladder)
    candidates = one_each(found.rungs, budget)
    for one in candidates:
        size = f"{one.size_bytes / 1e6:.2f} MB, p50 {one.p50_ms:.3f} ms, p99 {_ms(one.p99_ms)}"
        say(f"  {one.name}: {one.precision}, {size}: {f'over budget, {one.over}' if one.over else 'fits'}")
    return candidates, found.teacher_p50_ms


def one_each(candidates: Sequence[SearchCandidate], budget: spec.Budget) -> list[SearchCandidate]:
    """Choose each student's precision: the preferred one if it fits, else the quickest that fits, else the closest."""
    checked = [msgspec.structs.replace(one, over=over(one, budget)) for one in candidates]
    found = []
    for name in dict.fromkeys(one.name for one in candidates):
        first, *others = [one for one in checked if one.name == name]
        fitting = sorted((one for one in others if not one.over), key=lambda one: one.p50_ms)
        closest = min((first, *others), key=lambda one: _excess(one, budget))
        found.append(first if not first.over else fitting[0] if fitting else closest)
    return found


class _Ladder(msgspec.Struct, frozen=True):
    """`ladder.json`: for each student a candidate a precision, the preferred one first."""

    rungs: list[SearchCandidate]
    teacher_p50_ms: float | None
