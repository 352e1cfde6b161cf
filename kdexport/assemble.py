"""Finished stages → one `Report`. Stages never write into it; it is put together once, at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport import __version__, spec
from kdexport.artifact import SHIPPED_AS
from kdexport.bench.engine import Measured, read_measured
from kdexport.data import read_rows, read_summary
from kdexport.export import read_candidates
from kdexport.export.verify import read_quality
from kdexport.results import Distillation, Quality, Report, Variant
from kdexport.rundir import hash_file, read_record
from kdexport.tasks import load_task
from kdexport.tasks.metrics import mcnemar_p
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
    variants = [_teacher_variant(stages, quality, measured)] + [
        Variant(
            name=f"student-{c.name}",
            model="student",
            runtime="onnxruntime",
            device="cpu",
            precision=c.precision,
            graph=c.graph,
            file=SHIPPED_AS[c.precision] if c in choice.shipped.values() else None,
            sha256=hash_file(stages.export / c.file),
            size_bytes=(stages.export / c.file).stat().st_size,
            parameters=_training(stages.student)["parameters"],
            shipped=c in choice.shipped.values(),
            **_measured(f"student-{c.name}", quality, measured),
        )
        for c in candidates
    ]
    task = load_task(stages.student)
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
            measured.latency[best],
            (stages.export / choice.recommended.file).stat().st_size,
        ),
        distillation=_distillation(settings, stages, quality, best),
        data={
            "rows": summary.rows,
            "bad_rows": summary.bad_rows,
            "split_by_us": summary.split_by_us,
            "sha256": read_record(stages.data).outputs,
        },
        leakage=msgspec.to_builtins(summary.duplicates),
        bench=measured.conditions,
        environment=measured.environment,
        spec=msgspec.to_builtins(settings),
        seconds={p.name: read_record(p).seconds for p in stages[1:] if p is not None},
    )
    return report, choice


def made_from(report: Report) -> dict[str, Any]:
    """What the manifest says of how the artifact was made."""
    best = report.variant(report.recommended)
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


def _teacher_variant(stages: Stages, quality: dict[str, Quality], measured: Measured) -> Variant:
    weights = sorted(stages.teacher.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    return Variant(
        name="teacher-torch",
        model="teacher",
        runtime="torch",
        device="cpu",
        precision="fp32",
        graph="eager",
        file=None,
        sha256=hash_file(weights[0]) if len(weights) == 1 else None,
        size_bytes=size,
        parameters=None,
        shipped=False,
        **_measured("teacher-torch", quality, measured),
    )


def _measured(name: str, quality: dict[str, Quality], measured: Measured) -> dict[str, Any]:
    found = quality[name]
    return {
        "metric": found.metric,
        "agreement": found.agreement,
        "mcnemar_p": found.mcnemar_p,
        "max_abs_diff": found.max_abs_diff,
        "latency_ms": measured.latency.get(name),
        "speedup_p50": measured.speedup.get(name),
    }


def _distillation(settings: spec.Spec, stages: Stages, quality: dict[str, Quality], best: str) -> Distillation:
    teacher, student = quality["teacher-torch"].metric, quality["student-torch"].metric
    baseline = quality["baseline-torch"].metric if "baseline-torch" in quality else None
    training = _training(stages.student)
    gain = ratio = p = None
    if baseline:
        gain = 100 * (student.value - baseline.value)
        room = teacher.value - baseline.value
        ratio = (student.value - baseline.value) / room if room > 0 else None
        p = _paired_p(stages, "student-torch", "baseline-torch")
    return Distillation(
        teacher=teacher,
        student=student,
        baseline=baseline,
        retention=quality[best].metric.value / teacher.value if teacher.value else 0.0,
        gain_points=gain,
        gain_mcnemar_p=p,
        ratio=ratio,
        temperature=settings.distill.temperature,
        alpha=settings.distill.alpha,
        origin=training["origin"],
        student_curve=training["curve"],
        baseline_curve=_training(stages.baseline)["curve"] if stages.baseline else [],
    )


def _paired_p(stages: Stages, a: str, b: str) -> float:
    task, rows = load_task(stages.student), read_rows(stages.data, "test")
    with np.load(stages.verify / "logits.npz") as logits:
        return mcnemar_p(task.hits(logits[a], rows), task.hits(logits[b], rows))


def _training(folder: Path) -> dict[str, Any]:
    return msgspec.json.decode((folder / "training.json").read_bytes(), type=dict[str, Any])
