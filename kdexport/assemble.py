"""Finished stages → one `Report`. Stages never write into it; it is put together once, at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport import __version__, spec
from kdexport.artifact import SHIPPED_AS
from kdexport.bench.engine import Measured, read_measured
from kdexport.bench.targets import Target
from kdexport.data import read_rows, read_summary
from kdexport.evidence import look_closely
from kdexport.export import Candidate, read_candidates
from kdexport.export.verify import read_quality
from kdexport.results import Distillation, Quality, Report, Variant
from kdexport.rundir import hash_file, read_record
from kdexport.tasks import load_task
from kdexport.tasks.metrics import Array, mcnemar_p, paired_difference
from kdexport.verdict import Choice, choose, judge_budget


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


def assemble(settings: spec.Spec, stages: Stages) -> tuple[Report, Choice]:
    """The report, and the choice of files that it recommends."""
    quality, measured = read_quality(stages.verify), read_measured(stages.bench)
    candidates = [c for c in read_candidates(stages.export) if f"student-{c.name}" in quality]
    choice = choose(candidates, quality, measured, settings.export)
    best = f"student-{choice.recommended.name}"
    files = {c.file: c for c in candidates}
    task, rows = load_task(stages.student), read_rows(stages.data, "test")
    logits = _logits(stages)
    right = {name: task.hits(found, rows) for name, found in logits.items()}
    # Targets are matched by file name, not by path: a run folder may have been moved since.
    variants = [
        _file_variant(target, files[Path(target.model).name], choice, quality, measured, right, stages)
        if Path(target.model).name in files
        else _model_variant(target, quality, measured, right, stages)
        for target in measured.targets
        if target.name not in measured.conditions.left_out
    ]
    summary = read_summary(stages.data)
    report = Report(
        kdexport=__version__,
        task=settings.task,
        metric=task.metric_name,
        labels=task.labels,
        recommended=best,
        reason=choice.reason,
        variants=variants,
        budget=judge_budget(
            settings.budget,
            quality[best],
            quality["teacher-torch"],
            paired_difference(right["teacher-torch"], right[best])[1],
            measured.latency.get(best),
            (stages.export / choice.recommended.file).stat().st_size,
        ),
        distillation=_distillation(settings, stages, quality, best, right),
        evidence=look_closely(task, rows, logits["teacher-torch"], logits[best]),
        data={
            "name": settings.data.train,
            "rows": summary.rows,
            "bad_rows": summary.bad_rows,
            "split_by_us": summary.split_by_us,
            "sha256": read_record(stages.data).outputs,
        },
        leakage=msgspec.to_builtins(summary.duplicates),
        bench=msgspec.structs.replace(measured.conditions, price_per_hour=settings.bench.price_per_hour),
        environment=measured.environment,
        spec=msgspec.to_builtins(settings),
        seconds={p.name: read_record(p).seconds for p in stages[1:] if p is not None},
        command=f"kdexport run {stages.run}/spec.yaml --out {stages.run}",
    )
    return report, choice


def made_from(report: Report) -> dict[str, Any]:
    """What the manifest says of how the artifact was made."""
    best = report.variant(report.recommended)
    assert report.distillation
    assert best.metric
    return {
        "teacher": report.spec["teacher"]["model"],
        "student": report.spec["student"]["model"],
        "origin": report.distillation.origin,
        "temperature": report.distillation.temperature,
        "alpha": report.distillation.alpha,
        "seed": report.spec["seed"],
        "data_sha256": report.data["sha256"],
        "metric": {"name": report.metric, "value": best.metric.value, "ci95": best.metric.ci95},
        "reason": report.reason,
    }


def _file_variant(
    target: Target,
    candidate: Candidate,
    choice: Choice,
    quality: dict[str, Quality],
    measured: Measured,
    right: dict[str, Array],
    stages: Stages,
) -> Variant:
    shipped = candidate in choice.shipped.values()
    return Variant(
        name=target.name,
        model="student",
        runtime=target.runtime,
        device=target.device,
        precision=candidate.precision,
        graph=candidate.graph,
        file=SHIPPED_AS[candidate.precision] if shipped else None,
        sha256=hash_file(stages.export / candidate.file),
        size_bytes=(stages.export / candidate.file).stat().st_size,
        parameters=_training(stages.student)["parameters"],
        shipped=shipped and target.name == f"student-{candidate.name}",
        **_found(target.name, quality, measured, right),
    )


def _model_variant(
    target: Target, quality: dict[str, Quality], measured: Measured, right: dict[str, Array], stages: Stages
) -> Variant:
    """A model in PyTorch: teacher or student."""
    role = target.name.partition("-")[0]
    return Variant(
        name=target.name,
        model=role,
        runtime=target.runtime,
        device=target.device,
        precision="fp32",
        graph="eager" if target.runtime == "torch" else "compiled",
        file=None,
        **weights(stages.teacher if role == "teacher" else stages.student),
        **_found(target.name, quality, measured, right),
    )


def weights(folder: Path) -> dict[str, Any]:
    """Size, and sha256 where it is one file, of a Hugging Face folder's weights."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    size = sum(path.stat().st_size for path in files)
    return {"size_bytes": size or None, "sha256": hash_file(files[0]) if len(files) == 1 else None}


def speed(name: str, measured: Measured) -> dict[str, Any]:
    """What the engine found of a variant."""
    return {
        "latency_ms": measured.latency.get(name),
        "speedup_p50": measured.speedup.get(name),
        "speedup_p99": measured.speedup_p99.get(name),
        "footprint": measured.footprint.get(name),
        "cells": measured.cells.get(name, []),
        "note": measured.conditions.failed.get(name, ""),
    }


def _found(name: str, quality: dict[str, Quality], measured: Measured, right: dict[str, Array]) -> dict[str, Any]:
    found = speed(name, measured)
    if name in quality:  # another runtime may answer otherwise; its accuracy was not taken
        found |= msgspec.structs.asdict(quality[name])
        found["wrong_rows"] = np.flatnonzero(~right[name]).tolist()
    return found


def _distillation(
    settings: spec.Spec, stages: Stages, quality: dict[str, Quality], best: str, right: dict[str, Array]
) -> Distillation:
    teacher, student = quality["teacher-torch"].metric, quality["student-torch"].metric
    baseline = quality["baseline-torch"].metric if "baseline-torch" in quality else None
    training = _training(stages.student)
    gain = gain_ci = ratio = p = None
    if baseline:
        value, (low, high) = paired_difference(right["baseline-torch"], right["student-torch"])
        gain, gain_ci = 100 * value, (100 * low, 100 * high)
        room = teacher.value - baseline.value
        ratio = (student.value - baseline.value) / room if room > 0 else None
        p = mcnemar_p(right["student-torch"], right["baseline-torch"])
    return Distillation(
        teacher=teacher,
        student=student,
        baseline=baseline,
        retention=quality[best].metric.value / teacher.value if teacher.value else 0.0,
        gain_points=gain,
        gain_ci95=gain_ci,
        gain_mcnemar_p=p,
        ratio=ratio,
        temperature=settings.distill.temperature,
        alpha=settings.distill.alpha,
        origin=training["origin"],
        student_curve=training["curve"],
        baseline_curve=_training(stages.baseline)["curve"] if stages.baseline else [],
    )


def _logits(stages: Stages) -> dict[str, Array]:
    with np.load(stages.verify / "logits.npz") as logits:
        return {name: logits[name] for name in logits.files}


def _training(folder: Path) -> dict[str, Any]:
    return msgspec.json.decode((folder / "training.json").read_bytes(), type=dict[str, Any])
