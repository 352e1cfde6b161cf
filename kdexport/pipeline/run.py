"""From a spec to an artifact and a report, stage by stage.

Each stage reads finished folders, writes its own, and is skipped while its inputs are unchanged. Heavy imports are
inside the stages, so a finished run returns at once.
"""

import os
import tempfile
from pathlib import Path

from msgspec.structs import replace

from kdexport import ranks, spec
from kdexport.asking import stage as asking
from kdexport.bench.engine import bench as measure
from kdexport.bench.machine import maker
from kdexport.bench.subjects import of_file, of_model
from kdexport.data import prepare, read_rows, read_summary
from kdexport.data.corrections import read_corrections
from kdexport.data.sources import local_files
from kdexport.distill import teachers
from kdexport.export import read_candidates
from kdexport.export.verify import verify
from kdexport.files import disk_errors
from kdexport.output import PRIVATE
from kdexport.pipeline.choose import Choice
from kdexport.pipeline.rehearse import rehearse
from kdexport.pipeline.report import Stages, assemble, made_from
from kdexport.pipeline.search import search, teacher_targets
from kdexport.pipeline.students import Students, local
from kdexport.progress import say
from kdexport.report import write_card, write_reports
from kdexport.results import Report
from kdexport.results.report import read_report
from kdexport.runtime import artifact
from kdexport.runtime.predictor import golden_answers
from kdexport.spec import derive
from kdexport.spec.teachers import asked as asks
from kdexport.stages import Run
from kdexport.tasks import load_task, task_class
from kdexport.tasks.inputs.cache import limit_memory


def run(settings: spec.Spec, out: Path, *, move_aside: bool = False) -> Report:
    """Run the unfinished stages of the run folder `out`, and return the report."""
    derive.check_dealt(settings, ranks.size())
    limit_memory(settings.data.cache_mb)
    with ranks.led(lambda: _facts(settings, out, move_aside)) as leads:
        report = _run(settings, out, move_aside) if leads else None
    return report or read_report(out / "report.json")


def _facts(settings: spec.Spec, out: Path, move_aside: bool) -> dict[str, str]:
    """Return what has to be the same in all processes of a run."""
    return {"--out": str(out.resolve()), "--move-aside": str(move_aside)} | {
        key: str(value) for key, value in spec.values(settings)
    }


def _run(settings: spec.Spec, out: Path, move_aside: bool) -> Report:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    settings = asking.with_labels(settings)
    names = derive.students(settings)
    files = local_files(settings.data)
    sources = [
        *files,
        *asking.files(settings),
        *teachers.files(settings),
        *teachers.corrections_of(settings),
        *local(*names),
    ]
    here = maker()
    with Run(out, sources, spec.dump(settings), here, move_aside=move_aside) as folder, disk_errors(out):
        ranks.check_shared(out / PRIVATE, "the run's folder", "Name one with --out that all machines share")
        # 1. Read, check, split and audit the rows.
        data = folder.stage(
            "data", version=5, reads=[*files, *local(*teachers.read_by(settings))],
            settings=[
                settings.task, replace(settings.data, cache_mb=None), settings.seed, *teachers.read_by(settings),
                *(["few labels"] if asks(settings) else []),
            ],
            build=lambda work: _data(settings, work),
        )  # fmt: skip

        # Ask a teacher that answers some texts only; from here on the data are those texts.
        if asks(settings):
            data = folder.stage(
                "asked", version=1, settings=asking.settings_of(settings), reads=[data, *asking.files(settings)],
                build=lambda work: asking.ask(settings, data, work),
            )  # fmt: skip

        # 2. Prepare the teacher or teachers; fine-tune them if the spec asks for it.
        teacher = folder.stage(
            "teacher", version=4, settings=teachers.settings_of(settings), reads=[data, *teachers.files(settings)],
            build=lambda work: _teachers(settings, data, work),
        )  # fmt: skip

        # 3. Compute soft targets once for all students, also of unlabelled and augmented texts.
        targets = folder.stage(
            "targets", version=4, settings=teachers.asked_of(settings),
            reads=[data, teacher, *teachers.corrections_of(settings)],
            build=lambda work: _targets(settings, data, teacher, work),
        )  # fmt: skip

        # 4. Train and export the student, or search for the best one: ONNX files of each graph and precision.
        make = Students(settings, folder, data, teacher, targets)
        student, export, searched = search(make, names) if len(names) > 1 else (*make.whole(names[0]), None)

        # 5. Train the same student on labels alone, as the baseline, and both with other seeds.
        name = searched.winner if searched else names[0]
        baseline = make.baseline(name)
        other_seeds = make.other_seeds(name, baseline is not None)

        # 6. Verify each file against the student in PyTorch, and measure its metric.
        verified = folder.stage(
            "verify", version=3, settings=None,
            reads=[data, targets, student, export, *([baseline] if baseline else [])],
            build=lambda work: verify(data, targets, student, baseline, export, work),
        )  # fmt: skip

        # 7. Measure its speed, side by side with the teacher; on another machine again.
        bench = folder.stage(
            "bench", version=4, reads=[data, teacher, export],
            settings=[replace(settings.bench, price_per_hour=None), settings.seed, here["hardware"]],
            build=lambda work: _bench(settings, data, teacher, student, export, work),
        )  # fmt: skip

        # 8. Choose the files to ship, pack them, and write the report.
        stages = Stages(out, data, teacher, targets, student, baseline, export, verified, bench, searched, other_seeds)
        report, choice = assemble(settings, stages)
        packed = folder.stage(
            "artifact", version=2, settings=settings, reads=[student, export, verified, bench],
            build=lambda work: _pack(stages, report, choice, work),
        )  # fmt: skip
        folder.write_settings()
        write_reports(report, folder)
        say(f"artifact: {packed}")
        return report


def plan(settings: spec.Spec) -> list[tuple[str, str, str]]:
    """List every setting with its value and its meaning or reason; reads the data, as epochs depend on its size."""
    derive.check_dealt(settings, ranks.size())
    local_files(settings.data)
    settings = asking.with_labels(settings)
    with tempfile.TemporaryDirectory() as work:
        _data(settings, Path(work))
        train, validation = (read_rows(Path(work), split) for split in ("train", "validation"))
        summary = read_summary(Path(work))
    labels = len(summary.labels)
    rows = len(train)
    if settings.teacher.ask and settings.teacher.ask.max_calls:  # at most
        rows = min(rows + summary.unlabelled, settings.teacher.ask.max_calls)
    names = derive.students(settings)
    menu = task_class(settings.task, settings.data.problem).menu
    starts = {derive.start_of(settings.student, name, menu) for name in names}
    copies = rows * settings.distill.augment.views if settings.distill.augment else 0  # at most
    start = starts.pop() if len(starts) == 1 else "weights"
    epochs = derive.epochs(settings.distill, rows, copies, start, menu)
    usual = derive.batch_size(settings.distill, rows, start, menu)
    batch = _dealt(usual, settings.distill.accumulate, "distill.batch_size")
    unnamed = "there is a budget: the ladder that is searched" if settings.budget.binds() else "there is no budget"
    derived = {
        "distill.epochs": (f"{epochs.value:g}", epochs.reason),
        "distill.batch_size": (f"{batch.value:g}", batch.reason),
        "student.model": (", ".join(names), "as given" if settings.student.model else unnamed),
    }
    shape = derive.shape_of(names[0])
    if len(names) == 1 and (shape.width or shape.kind in ("network", "conv")):
        rate = derive.learning_rate(settings.distill, settings.student, names[0], shape.width, menu, batch.value)
        derived["distill.learning_rate"] = (f"{rate.value:g}", rate.reason)
    if teachers.gives_base(settings):
        why = "as given" if settings.student.base else "the teacher has no weights to give"
        derived["student.base"] = (spec.teachers.origin(settings), why)
    if summary.language:
        why = "as given" if settings.data.language else "detected by the teacher in train, or its only one"
        derived["data.language"] = (summary.language, why)
    taught, judging = (sum(row["label"] is not None for row in split) for split in (train, validation))
    if training := teachers.training_of(settings, taught, judging, labels):
        accumulate = settings.teacher.train.accumulate if settings.teacher.train else 1
        batch = _dealt(training.batch_size, accumulate, "teacher.train.batch_size")
        training = training._replace(batch_size=batch)
        of_teacher = {name: d for name, d in training._asdict().items() if d}
        derived |= {f"teacher.train.{name}": (f"{d.value:g}", d.reason) for name, d in of_teacher.items()}
    if task_class(settings.task).modality == "text":
        most = task_class(settings.task).usual_length
        why = "as given" if settings.data.max_length else f"{most}, or the teacher's limit if that is less"
        derived["data.max_length"] = (str(settings.data.max_length or most), why)
    table, helps = [], spec.settings()
    for key, value in spec.values(settings):
        text = helps[key]
        if value is None and key.startswith("teacher.train.") and key not in derived:
            continue
        shown, reason = derived.get(key, ("–" if value is None else str(value), text))
        table.append((key, shown, reason))
    return table


def _dealt(batch: derive.Derived, accumulate: int, key: str) -> derive.Derived:
    batch = derive.dealt(batch, ranks.size(), accumulate, key)
    a_pass = f"; {batch.value / ranks.size() / accumulate:g} in a pass of each of {ranks.size()} processes"
    return batch._replace(reason=batch.reason + a_pass) if ranks.size() * accumulate > 1 else batch


def _data(settings: spec.Spec, work: Path) -> None:
    teachers.check(settings)
    transcribe = teachers.transcriber_of(settings)
    prepare(
        settings.data, settings.task, settings.seed, work, teachers.cut_of(settings), transcribe,
        few_labels=settings.data.labels is not None or asks(settings),
    )  # fmt: skip


def _teachers(settings: spec.Spec, data: Path, work: Path) -> None:
    teachers.check(settings)
    rehearse(settings)
    _corrections(settings, data)
    teachers.prepare_teachers(settings, data, work)


def _corrections(settings: spec.Spec, data: Path) -> dict[str, str]:
    labels = read_summary(data).labels
    return {
        content: label
        for path in teachers.corrections_of(settings)
        for content, label in read_corrections(path, settings, labels).items()
    }


def _targets(settings: spec.Spec, data: Path, teacher: Path, work: Path) -> None:
    from kdexport.distill.soft_targets import write_targets

    distill = settings.distill
    write_targets(
        data, teacher, work, how=settings.teacher, augment=distill.augment, samples=distill.samples,
        seed=settings.seed, max_word_error=distill.max_word_error, corrections=_corrections(settings, data),
    )  # fmt: skip


def _bench(settings: spec.Spec, data: Path, teacher: Path, student: Path, export: Path, work: Path) -> None:
    how, files = settings.bench, read_candidates(export)
    # The choice is by ONNX Runtime on the CPU and the teacher in PyTorch, so these are always measured.
    runtimes = list(dict.fromkeys(("torch", "onnxruntime", *how.runtimes)))
    devices = list(dict.fromkeys(("cpu", *how.devices)))
    targets = teacher_targets(teacher, runtimes, devices) + of_model("student", student, runtimes, devices)
    for c in files:
        targets += of_file(f"student-{c.name}", student, export / c.file, runtimes, devices)
    # The last plain file is measured twice, as the engine's check of itself.
    twice = [f"student-{c.name}" for c in files if c.graph == "plain"][-1]
    measure(how, targets, read_rows(data, "test"), targets[0].name, settings.seed, work, control=twice)


def _pack(stages: Stages, report: Report, choice: Choice, work: Path) -> None:
    models = {p: (stages.export / c.file, c.graph) for p, c in choice.shipped.items()}
    golden = golden_answers(load_task(stages.student), {p: file for p, (file, _) in models.items()})
    columns = read_summary(stages.data).columns
    artifact.pack(stages.student, models, choice.recommended.precision, made_from(report), work, golden, columns)
    write_card(report, work / "README.md")
