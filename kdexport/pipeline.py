"""The story: from a spec to an artifact and a report, stage by stage.

Each stage reads finished folders, writes its own, and is skipped when nothing that went into it changed.
Heavy imports are inside the stages, so a run that has nothing left to do is instant.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from kdexport import artifact, spec
from kdexport.assemble import Stages, assemble, made_from
from kdexport.bench.targets import of_file, of_model
from kdexport.data import prepare, read_rows
from kdexport.data.sources import local_files
from kdexport.distill import recipe
from kdexport.export import read_candidates
from kdexport.predictor import golden_answers
from kdexport.progress import say
from kdexport.report import write_card, write_reports
from kdexport.results import Report
from kdexport.rundir import Run, disk_errors, write_text
from kdexport.tasks import load_task
from kdexport.verdict import Choice


def run(settings: spec.Spec, out: Path) -> Report:
    """Do the whole job, or what is left of it, in the run folder `out`.

    Raises:
        KdexportError: what the user gave can't be used; finished stages are kept.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    recipe.layers_to_keep(str(settings.student.model))  # a wrong name is said before an hour's work
    files = local_files(settings.data)
    with Run(out) as folder, disk_errors(out):
        write_text(out / "spec.yaml", spec.dump(settings))

        # 1. Rows: read, checked, split, audited.
        data = folder.stage(
            "data",
            version=1,
            settings=[settings.task, settings.data, settings.seed],
            reads=files,
            build=lambda work: prepare(settings.data, settings.task, settings.seed, work),
        )

        # 2. The teacher: fine-tuned if asked, else as it is.
        teacher = folder.stage(
            "teacher",
            version=1,
            settings=[settings.teacher, settings.data.max_length, settings.seed],
            reads=[data, *_local(settings.teacher.model)],
            build=lambda work: _teacher(settings, data, work),
        )

        # 3. Its soft targets: once for every text, whatever student follows.
        targets = folder.stage(
            "targets",
            version=1,
            settings=None,
            reads=[data, teacher],
            build=lambda work: _targets(data, teacher, work),
        )

        # 4. The student, trained on them; and the same student on labels alone, to see what they gave.
        student = folder.stage(
            "student",
            version=1,
            settings=[
                settings.student,
                msgspec.structs.replace(settings.distill, baseline=True),
                settings.seed,
            ],
            reads=[data, teacher, targets, *_local(settings.student.model)],
            build=lambda work: _student(settings, data, teacher, targets, work),
        )
        baseline = None
        if settings.distill.baseline:
            labels_only = msgspec.structs.replace(settings.distill, temperature=1.0, alpha=0.0)
            baseline = folder.stage(
                "baseline",
                version=1,
                settings=[settings.student, labels_only, settings.seed],
                reads=[data, teacher, *_local(settings.student.model)],
                build=lambda work: _student(settings, data, teacher, None, work),
            )

        # 5. ONNX: plain and fused, fp32 and int8.
        export = folder.stage(
            "export",
            version=2,
            settings=settings.export.variants,
            reads=[student],
            build=lambda work: _export(settings, student, work),
        )

        # 6. Does each file do what the student does? How good is it?
        verified = folder.stage(
            "verify",
            version=1,
            settings=None,
            reads=[data, targets, student, export, *([baseline] if baseline else [])],
            build=lambda work: _verify(data, targets, student, baseline, export, work),
        )

        # 7. How fast is it, side by side with the teacher?
        bench = folder.stage(
            "bench",
            version=4,
            settings=[msgspec.structs.replace(settings.bench, price_per_hour=None), settings.seed],
            reads=[data, teacher, export],
            build=lambda work: _bench(settings, data, teacher, student, export, work),
        )

        # 8. What it all says, and what ships.
        stages = Stages(out, data, teacher, targets, student, baseline, export, verified, bench)
        report, choice = assemble(settings, stages)
        packed = folder.stage(
            "artifact",
            version=2,
            settings=settings,
            reads=[student, export, verified, bench],
            build=lambda work: _pack(stages, report, choice, work),
        )
        write_reports(report, out)
        say(f"artifact: {packed}")
        return report


def plan(settings: spec.Spec) -> list[tuple[str, str, str]]:
    """Every setting with its value and where it comes from; what is derived with its reason. Runs nothing.

    The data is read, because the number of rows decides the number of epochs.
    """
    local_files(settings.data)
    with tempfile.TemporaryDirectory() as work:
        prepare(settings.data, settings.task, settings.seed, Path(work))
        rows = len(read_rows(Path(work), "train"))
    epochs = recipe.epochs(settings.distill, rows)
    derived = {"distill.epochs": (f"{epochs.value:g}", epochs.reason)}
    width = recipe.PRESETS.get(settings.student.model, (0, 0))[1]
    if width:
        rate = recipe.learning_rate(settings.distill, width, pretrained=False)
        derived["distill.learning_rate"] = (f"{rate.value:g}", rate.reason)
    derived["data.max_length"] = (
        str(settings.data.max_length or 128),
        "as given" if settings.data.max_length else "128, or what the teacher reads if that is less",
    )
    values = msgspec.to_builtins(settings)
    table = []
    for key, text in spec.settings().items():
        value = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and key.startswith("teacher.train."):
            continue
        shown, reason = derived.get(key, ("–" if value is None else str(value), text))
        table.append((key, shown, reason))
    return table


def _local(model: str) -> list[Path]:
    return [Path(model)] if Path(model).is_dir() else []


def _teacher(settings: spec.Spec, data: Path, work: Path) -> None:
    from kdexport.distill.teacher import prepare_teacher

    prepare_teacher(settings.teacher, data, settings.data.max_length, settings.seed, work)


def _targets(data: Path, teacher: Path, work: Path) -> None:
    from kdexport.distill.targets import write_targets

    write_targets(data, teacher, work)


def _student(settings: spec.Spec, data: Path, teacher: Path, targets: Path | None, work: Path) -> None:
    from kdexport.distill.student import train_student

    train_student(
        settings.student,
        settings.distill,
        data=data,
        teacher=teacher,
        targets=targets,
        seed=settings.seed,
        out=work,
    )


def _export(settings: spec.Spec, student: Path, work: Path) -> None:
    from kdexport.export import export_student

    export_student(settings.export, student, work)


def _verify(data: Path, targets: Path, student: Path, baseline: Path | None, export: Path, work: Path) -> None:
    from kdexport.export.verify import verify

    verify(data, targets, student, baseline, export, work)


def _bench(settings: spec.Spec, data: Path, teacher: Path, student: Path, export: Path, work: Path) -> None:
    from kdexport.bench.engine import bench

    how, files = settings.bench, read_candidates(export)
    # What ships is chosen on the CPU in ONNX Runtime, against the teacher in PyTorch: these are always measured.
    runtimes, devices = (
        list(dict.fromkeys(("torch", "onnxruntime", *how.runtimes))),
        list(dict.fromkeys(("cpu", *how.devices))),
    )
    targets = of_model("teacher", teacher, runtimes, devices) + of_model("student", student, runtimes, devices)
    for c in files:
        targets += of_file(f"student-{c.name}", student, export / c.file, runtimes, devices)
    # The last plain file is measured twice: the engine's check of itself.
    twice = [f"student-{c.name}" for c in files if c.graph == "plain"][-1]
    bench(how, targets, read_rows(data, "test"), targets[0].name, settings.seed, work, control=twice)


def _pack(stages: Stages, report: Report, choice: Choice, work: Path) -> None:
    models = {p: (stages.export / c.file, c.graph) for p, c in choice.shipped.items()}
    golden = golden_answers(load_task(stages.student), {p: file for p, (file, _) in models.items()})
    artifact.pack(stages.student, models, choice.recommended.precision, made_from(report), work, golden)
    write_card(report, work / "README.md")
