"""Finished stages → one `Report`, assembled once, at the end; stages never write into it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport import __version__, spec
from kdexport.analysis import sampled
from kdexport.analysis.evidence import look_closely
from kdexport.analysis.membership import membership
from kdexport.asking import stage as asking
from kdexport.bench.engine import Measured, read_measured
from kdexport.bench.subjects import Target
from kdexport.data import read_rows, read_summary
from kdexport.data.rows import Rows
from kdexport.distill.targets import SoftTargets
from kdexport.distill.teachers import kind_of_first
from kdexport.export import Candidate, read_candidates
from kdexport.export.verify import read_quality, read_validation
from kdexport.files import hash_file
from kdexport.pipeline.choose import Choice, choose, judge_budget
from kdexport.results import Asked, Distillation, Quality, Report, Search, Spread, Variant
from kdexport.runtime.artifact import shipped_as, size_of
from kdexport.stages import read_record
from kdexport.tasks import judging, load_task
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array, Metric


class Stages(NamedTuple):
    """The folders of a run."""

    run: Path
    data: Path
    teacher: Path
    targets: Path
    student: Path
    baseline: Path | None
    export: Path
    verify: Path
    bench: Path
    search: Search | None = None
    other_seeds: Sequence[tuple[Path, Path | None]] = ()


def assemble(settings: spec.Spec, stages: Stages) -> tuple[Report, Choice]:
    """Return the report, and the choice of files behind it."""
    quality, measured = read_quality(stages.verify), read_measured(stages.bench)
    candidates = [c for c in read_candidates(stages.export) if f"student-{c.name}" in quality]
    sizes = {c.name: size_of(stages.export / c.file) for c in candidates}
    validation = read_validation(stages.verify)
    choice = choose(candidates, validation, measured, settings.export, sizes, settings.budget.size_mb)
    best = f"student-{choice.recommended.name}"
    task, rows = load_task(stages.student), read_rows(stages.data, "test")
    with np.load(stages.verify / "logits.npz") as stored:
        logits = {name: stored[name] for name in stored.files}
    task = judging.judged(task, rows, logits["teacher"])
    wrong = {name: judging.wrong_rows(task, found, rows) for name, found in logits.items()}
    verdict = judge_budget(
        settings.budget, task.metric, quality[best].metric.value, quality["teacher"].metric.value,
        judging.difference(task, logits["teacher"], logits[best], rows)[1],
        measured.latency.get(best), sizes[choice.recommended.name],
    )  # fmt: skip
    summary, leaked = read_summary(stages.data), _membership(stages, task, rows, logits, choice)
    conditions = msgspec.structs.replace(measured.conditions, price_per_hour=settings.bench.price_per_hour)
    records = {path.name: read_record(path) for path in stages[1:] if isinstance(path, Path)}
    machines = {name: record.machine for name, record in records.items() if record.machine}
    report = Report(
        kdexport=__version__, task=settings.task, **described(task.metric), labels=task.labels, recommended=best,
        reason=choice.reason, variants=_variants(stages, candidates, choice, quality, measured, wrong), budget=verdict,
        search=stages.search, distillation=_distillation(settings, stages, quality, best, task, logits, rows),
        asked=_asked(settings, stages.data),
        evidence=look_closely(task, rows, logits["teacher"], logits[best]),
        data={"name": settings.data.train, "rows": summary.rows, "bad_rows": summary.bad_rows,
              "labelled": _labelled(stages.data) if task.has_labels else 0, "unlabelled": summary.unlabelled,
              "doubted": summary.doubted, "heard": summary.heard, "split_by_us": summary.split_by_us,
              "corrected": msgspec.json.decode((stages.targets / "targets.json").read_bytes()).get("corrected", 0),
              "sha256": read_record(stages.data).outputs},
        leakage=msgspec.to_builtins(summary.duplicates) | {"membership": leaked}, bench=conditions,
        environment=measured.environment, spec=msgspec.to_builtins(settings),
        seconds={name: record.seconds for name, record in records.items()},
        machines=machines, varies=_varies(machines.get(stages.student.name, {}), stages.search),
        command=f"kdexport run {stages.run}/spec.yaml --out {stages.run}",
    )  # fmt: skip
    return report, choice


def _asked(settings: spec.Spec, data: Path) -> Asked | None:
    """Return how the teacher was asked, if it was, with the price that the spec gives now."""
    file = data / asking.RECORD
    if not file.is_file():
        return None
    found = msgspec.json.decode(file.read_bytes(), type=Asked)
    return msgspec.structs.replace(found, price=settings.teacher.ask.price if settings.teacher.ask else None)


def _varies(trained_by: dict[str, Any], search: Search | None) -> list[str]:
    """Return what a second run of the same spec may give otherwise; all else has the same bytes."""
    threads, on = trained_by.get("threads", "?"), trained_by.get("name", "an unknown machine")
    found = [
        "times, memory and speedups, which are measured, and a choice between files that are nearly as fast",
        f"the last digits of weights and logits with other than {threads} threads, or on another machine than {on}",
    ]
    if trained_by.get("gpu"):
        found.append("weights and logits of a GPU, whose kernels sum in no fixed order")
    if search:
        found.append("which student the search tried first, as that rests on measured times")
    return found


def _labelled(data: Path) -> int:
    """Return the number of labelled rows of train and validation."""
    rows = read_rows(data, "train") + read_rows(data, "validation")
    return sum(row["label"] is not None and not row.get("heard") for row in rows)


def described(metric: Metric) -> dict[str, Any]:
    """Return a report's fields on the main metric."""
    return {"metric": metric.name, "metric_higher_is_better": metric.higher_is_better, "metric_kind": metric.kind}


def made_from(report: Report) -> dict[str, Any]:
    """Return the manifest's record of how the artifact was made."""
    best = report.variant(report.recommended)
    assert report.distillation
    assert best.metric
    return {
        "teacher": report.spec["teacher"]["model"],
        "student": report.distillation.model, "origin": report.distillation.origin,
        "temperature": report.distillation.temperature, "alpha": report.distillation.alpha,
        "seed": report.spec["seed"], "data_sha256": report.data["sha256"],
        "metric": {"name": report.metric, "value": best.metric.value, "ci95": best.metric.ci95},
        "reason": report.reason,
    }  # fmt: skip


def _variants(
    stages: Stages, candidates: list[Candidate], choice: Choice, quality: dict[str, Quality], measured: Measured,
    wrong: dict[str, list[int] | None],
) -> list[Variant]:  # fmt: skip
    """Return all files and models measured; a teacher of stored logits, which can't be measured, comes first."""
    files = {c.file: c for c in candidates}
    parameters = _training(stages.student)["parameters"]
    # Other runtimes may give other logits; their metric was not measured.
    known = {name: msgspec.structs.asdict(found) | {"wrong_rows": wrong[name]} for name, found in quality.items()}
    known |= dict.fromkeys(("teacher-torch", "teacher-fp32"), known["teacher"])

    def variant(target: Target) -> Variant:
        role = target.name.partition("-")[0]
        # The run folder may have been moved since: only the file's name holds.
        file = (stages.teacher if role == "teacher" else stages.export) / Path(target.model).name
        of_torch = "eager" if target.runtime == "torch" else "compiled"
        own: dict[str, Any] = {"precision": "fp32", "graph": of_torch, "file": None}
        if role == "student" and (candidate := files.get(file.name)):
            shipped = candidate in choice.shipped.values()
            own = {
                "precision": candidate.precision, "graph": candidate.graph, "parameters": parameters,
                "file": shipped_as(candidate.precision, stages.export / candidate.file) if shipped else None,
                "shipped": shipped and target.name == f"student-{candidate.name}", **on_disk(file),
            }  # fmt: skip
        elif target.runtime == "onnxruntime":
            own |= {"graph": "plain", **on_disk(file)}
        else:
            own |= weights(stages.teacher if role == "teacher" else stages.student)
        return Variant(
            name=target.name, model=role, runtime=target.runtime, device=target.device, **own,
            **speed(target.name, measured), **known.get(target.name, {}),
        )  # fmt: skip

    left_out = measured.conditions.left_out
    variants = [variant(target) for target in measured.targets if target.name not in left_out]
    notes = {
        "stored": "stored logits: there is no model to measure", "zero-shot": "it reads each text once for each label",
    }  # fmt: skip
    if note := notes.get(kind := kind_of_first(stages.teacher)):
        stored = Variant(
            name=f"teacher-{kind}", model="teacher", runtime=kind, device="none", precision="fp32", graph="none",
            file=None, sha256=None, size_bytes=None, note=note, **known["teacher"],
        )  # fmt: skip
        variants.insert(0, stored)
    return variants


def on_disk(file: Path) -> dict[str, Any]:
    """Return size and sha256 of a file, as fields of a variant."""
    return {"size_bytes": size_of(file), "sha256": hash_file(file)}


def weights(folder: Path) -> dict[str, Any]:
    """Return size, and sha256 if they are one file, of a Hugging Face folder's weights."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    size = sum(path.stat().st_size for path in files)
    return {"size_bytes": size or None, "sha256": hash_file(files[0]) if len(files) == 1 else None}


def speed(name: str, measured: Measured) -> dict[str, Any]:
    """Return the engine's figures of a variant."""
    return {
        "latency_ms": measured.latency.get(name), "footprint": measured.footprint.get(name),
        "speedup_p50": measured.speedup.get(name), "speedup_p99": measured.speedup_p99.get(name),
        "cells": measured.cells.get(name, []), "note": measured.conditions.failed.get(name, ""),
    }  # fmt: skip


def _distillation(
    settings: spec.Spec, stages: Stages, quality: dict[str, Quality], best: str, task: Task,
    logits: dict[str, Array], rows: Rows,
) -> Distillation:  # fmt: skip
    teacher, student = quality["teacher"].metric, quality["student-torch"].metric
    baseline = quality["baseline-torch"].metric if "baseline-torch" in quality else None
    training = _training(stages.student)
    gain = gain_ci = ratio = p = None
    if baseline:
        both = logits["baseline-torch"], logits["student-torch"]
        value, (low, high) = judging.difference(task, *both, rows)
        scale = (1 if task.metric.higher_is_better else -1) * (1 if task.metric.kind == "number" else 100)
        gain, (low, high) = scale * value, sorted((scale * low, scale * high))
        gain_ci = low, high
        room = task.metric.gain(baseline.value, teacher.value)
        ratio = task.metric.gain(baseline.value, student.value) / room if room > 0 else None
        if task.metric.kind == "fraction":
            p = judging.mcnemar(task, *both, rows)
    further = {name: found.further for name, found in quality.items() if found.further}
    roles = ("teacher", "student-torch", "baseline-torch")
    return Distillation(
        teacher=teacher, student=student, baseline=baseline, gain_points=gain, gain_ci95=gain_ci, gain_mcnemar_p=p,
        ratio=ratio, retention=task.metric.retention(quality[best].metric.value, teacher.value),
        model=training["student"], origin=training["origin"], loss=_as_text(settings.distill.loss),
        temperature=_as_text(settings.distill.temperature), alpha=_as_text(settings.distill.alpha),
        student_seeds=_spread(stages, [stages.student, *(pair[0] for pair in stages.other_seeds)]),
        baseline_seeds=_spread(stages, [stages.baseline, *(pair[1] for pair in stages.other_seeds)]),
        student_curve=training["curve"],
        baseline_curve=_training(stages.baseline)["curve"] if stages.baseline else [],
        further={name.removesuffix("-torch"): further[name] for name in roles if name in further},
    )  # fmt: skip


def _membership(stages: Stages, task: Task, rows: Rows, logits: dict[str, Array], choice: Choice) -> dict[str, Any]:
    """Run membership inference on the teacher and the recommended student."""
    train = read_rows(stages.data, "train")
    places = sampled(len(train))
    members, precision = [train[i] for i in places], choice.recommended.precision
    plain = f"student-{precision if precision != 'fp16' else 'fp32'}"  # fused or not, the logits are the same
    with np.load(stages.verify / "members.npz") as found:
        student = membership(task, members, found[plain], rows, logits[plain])
    taught = SoftTargets(load_task(stages.teacher), stages.targets / "train.npy").judged(places)
    teacher = membership(task, members, taught, rows, logits["teacher"])
    return {"teacher": msgspec.to_builtins(teacher), "student": msgspec.to_builtins(student)}


def _spread(stages: Stages, stage_of_each: list[Path | None]) -> Spread | None:
    """Return the test metric in PyTorch over seeds, or None if there is only one."""
    folders = [folder for folder in stage_of_each if folder]
    if len(folders) < 2:
        return None
    rows, task = read_rows(stages.data, "test"), load_task(stages.student)
    task = judging.judged(task, rows, np.load(stages.targets / "test.npy"))
    values = [judging.metric(task, np.load(f / "reference.npy")[: len(rows)], rows) for f in folders]
    return Spread(values, float(np.mean(values)), float(np.std(values, ddof=1)))


def _as_text(value: Any) -> Any:
    """Return a setting for the report: schedules and sums of losses as text, others as they are."""
    match value:
        case spec.Schedule():
            return f"{value.start:g} → {value.end:g}"
        case dict():
            return " + ".join(f"{_as_text(weight)} · {name}" for name, weight in value.items())
    return value


def _training(folder: Path) -> dict[str, Any]:
    return msgspec.json.decode((folder / "training.json").read_bytes(), type=dict[str, Any])
