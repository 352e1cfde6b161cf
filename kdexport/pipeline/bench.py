"""`kdexport bench`: names on the command line → targets → one report, side by side.

A name is a run or an artifact (all its files, or one: `folder:int8`), an ONNX file of one, a Hugging Face
folder or hub id, or the address of a server.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kdexport import __version__, spec
from kdexport.bench.answers import logits_of
from kdexport.bench.engine import Measured, bench
from kdexport.bench.loads import Loads
from kdexport.bench.process import Crashed
from kdexport.bench.subjects import Target, of_file, of_model
from kdexport.data import read_rows
from kdexport.data.sources import read_given
from kdexport.errors import ArtifactError, SpecError
from kdexport.files import hash_file
from kdexport.output import Output
from kdexport.pipeline.report import speed, weights
from kdexport.progress import bar, say, warn
from kdexport.report import write_reports
from kdexport.report.table import trimmed
from kdexport.results import Metric, Report, Variant
from kdexport.runtime import artifact
from kdexport.tasks import DEFAULT, load_task
from kdexport.tasks.inputs.media import inline
from kdexport.tasks.judging import mcnemar, metric_interval, wrong_rows
from kdexport.tasks.metrics import Array
from kdexport.tasks.text_classification import TextClassification

FILES = ("bench.json", "samples.npz", "report.json", "report.md", "report.html")


def measure(
    names: Sequence[str],
    settings: spec.Bench,
    out: Path,
    *,
    texts: spec.Data | None = None,
    reference: str | None = None,
    loads: Loads | None = None,
    command: str = "",
    move_aside: bool = False,
) -> Report:
    """Measure everything that is named, and write report.json, .md, .html, bench.json and samples.npz into `out`.

    Args:
        names: what to measure.
        settings: how.
        out: a folder, made when absent.
        texts: a file (with labels, accuracy is taken too) and its columns; by default a named run's test split.
        reference: the variant that ratios are taken to; the first by default.
        loads: what to put on servers.
        command: the command line, for the report.
        move_aside: rename what kdexport did not write and stands in the way, rather than refuse.

    Raises:
        SpecError: a name is nothing that can be measured, or there are no texts.
        RunError: `out` holds something else than what this function wrote.
    """
    with Output(out, "bench", move_aside=move_aside) as folder, tempfile.TemporaryDirectory() as work:
        folder.check(*FILES)
        targets = [t for i, name in enumerate(names) for t in find_targets(name, settings, Path(work) / str(i))]
        targets = [_told_apart(t, targets[:i]) for i, t in enumerate(targets)]
        known = [t.name for t in targets]
        if reference and reference not in known:
            raise SpecError(f"--reference {reference!r} is not measured", f"It is one of: {', '.join(known)}")
        rows = read_texts(texts, names, next((t.task for t in targets if t.task), None))
        # One of them is measured twice, as the engine's check of itself.
        quick = ("onnxruntime", "openvino", "torch")  # a twin costs as much as its model: best a file
        control = next((t.name for kind in quick for t in targets if t.runtime == kind), None)
        first = reference or known[0]
        made = folder.work("bench")
        made.mkdir(exist_ok=True)
        measured = bench(settings, targets, rows, first, 0, made, control=control, loads=loads)
        report = _report(targets, measured, rows, first, command)
        for name in ("bench.json", "samples.npz"):
            folder.replace(made / name, name)
        with contextlib.suppress(OSError):  # rounds of an interrupted call of other targets may go on
            made.rmdir()
        write_reports(report, folder)
    return report


def _told_apart(target: Target, before: list[Target]) -> Target:
    """The same target, numbered where its name was taken already."""
    same = sum(other.name == target.name for other in before)
    return msgspec.structs.replace(target, name=f"{target.name} #{same + 1}") if same else target


def find_targets(name: str, settings: spec.Bench, work: Path) -> list[Target]:
    """What one name on the command line stands for.

    Raises:
        SpecError, ArtifactError, ModelError: it stands for nothing that can be measured.
    """
    if re.match(r"https?://", name):
        return [Target(re.sub(r"^https?://", "", name), "http", "", name)]
    path, variant = artifact.split_name(name)
    folder = artifact.resolve(path)
    if (folder / artifact.MANIFEST).exists():
        return _artifact_targets(folder, variant, settings)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist", "Check the path")
        return of_file(path.stem, _task_beside(path), path, settings.runtimes, settings.devices)
    if path.is_dir() and not (path / "config.json").exists():
        raise SpecError(
            f"{path} is no artifact, run or model",
            "Name a run, an artifact, a .onnx file, a model folder or an address",
        )
    return _model_targets(name, settings, work)


def _artifact_targets(folder: Path, variant: str | None, settings: spec.Bench) -> list[Target]:
    manifest = artifact.read_manifest(folder)
    label = folder.resolve().parent.name if folder.name == "artifact" else folder.resolve().name
    return [
        target
        for precision in ([variant] if variant else manifest.variants)
        for target in of_file(
            f"{label}-{precision}", folder, artifact.model_file(folder, precision), settings.runtimes, settings.devices
        )
    ]


def _model_targets(name: str, settings: spec.Bench, work: Path) -> list[Target]:
    """A Hugging Face model in PyTorch's runtimes; its task is made from its tokenizer and labels."""
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SpecError(f"{name} does not exist", "Name a run, an artifact, a .onnx file, a model folder or an address")
    from kdexport.models.loading import open_config, open_model, own_labels
    from kdexport.models.registry import task_of
    from kdexport.models.saving import save_task

    label = Path(name).name
    if (Path(name) / "task.json").exists():
        targets = of_model(label, Path(name), settings.runtimes, settings.devices)
    else:
        config = open_config(name)
        work.mkdir()
        task = task_of(config) or DEFAULT
        save_task(open_model(name, config, task, own_labels(config)), None, own_labels(config), work, task=task)
        targets = [
            msgspec.structs.replace(t, task=str(work), model=name)
            for t in of_model(label, Path(name), settings.runtimes, settings.devices)
        ]
    if not targets:
        raise SpecError(f"{name} is a PyTorch model, and no runtime of it is asked for", "Add --runtime torch")
    return targets


def _task_beside(file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / "task.json").exists() or (folder / artifact.MANIFEST).exists():
            return folder
    raise ArtifactError(f"{file} lies in no artifact: no {artifact.MANIFEST} beside it", "Name the artifact's folder")


def read_texts(texts: spec.Data | None, names: Sequence[str], task: str | None = None) -> list[dict[str, Any]]:
    """Rows of the file that was given, else of the test split of the first run among the names.

    Args:
        texts: the file and its columns, by default those of the rows that the model of `task` was trained on.
        names: what to measure.
        task: folder of a task; texts are classified without one.

    Raises:
        SpecError: there is neither. DataError: a column or a row of the file is wrong.
    """
    if texts:
        of_task = type(load_task(Path(task))) if task else TextClassification
        known = artifact.read_columns(Path(task)) if task else {}
        rows, _ = read_given(texts, of_task, "some", known)
        return [row | {key: inline(value) for key, value in row.items() if isinstance(value, bytes)} for row in rows]
    for name in names:
        place = artifact.split_name(name)[0]
        for run in (place, *list(place.resolve().parents)[:3]):
            if (run / "data" / "test.jsonl").is_file():
                say(f"bench: texts are those of {run}/data/test.jsonl")
                return read_rows(run / "data", "test")
    raise SpecError("there are no texts to measure with", "Name a file of real ones: --data texts.csv")


def _report(targets: list[Target], measured: Measured, rows: list[dict[str, Any]], first: str, command: str) -> Report:
    known = [t for t in targets if t.name in measured.latency or t.name in measured.conditions.failed]
    task = load_task(Path(next((t.task for t in known if t.task), ""))) if any(t.task for t in known) else None
    strange = [row["label"] for row in rows if task and row.get("label") not in (None, "", *task.labels)]
    if strange:
        warn(f"bench: no accuracy is taken: label {strange[0]!r} of the texts is none of the model's")
    logits = _answers([t for t in known if t.runtime != "http" and t.name in measured.latency], rows)
    return Report(
        kdexport=__version__,
        task=task.name if task else DEFAULT,
        metric=task.metric.name if task else "accuracy",
        labels=task.labels if task else [],
        recommended=None,
        reason=_summary(measured, first),
        variants=[_variant(t, measured, logits, rows, first) for t in known],
        bench=measured.conditions,
        environment=measured.environment,
        command=command,
    )


def _variant(
    target: Target, measured: Measured, logits: dict[str, Array], rows: list[dict[str, Any]], first: str
) -> Variant:
    is_file, file = target.model.endswith(".onnx"), Path(target.model)
    precision = re.search(r"fp16|int8|quantized", f"{target.name} {file.name}") if is_file else None
    size = {"size_bytes": None, "sha256": None} if target.runtime == "http" else weights(file)
    if is_file:
        size = {"size_bytes": file.stat().st_size, "sha256": hash_file(file)}
    return Variant(
        name=target.name,
        model=target.name,
        runtime=target.runtime,
        device=target.device,
        precision=(precision[0].replace("quantized", "int8") if precision else "fp32"),
        graph="server" if target.runtime == "http" else "file" if is_file else "model",
        file=target.model,
        **size,
        **speed(target.name, measured),
        **_quality(target, logits, rows, first),
    )


def _quality(target: Target, logits: dict[str, Array], rows: list[dict[str, Any]], first: str) -> dict[str, Any]:
    """The metric where rows have labels that the task knows, and agreement with the reference."""
    own, theirs = logits.get(target.name), logits.get(first)
    if own is None:
        return {}
    found: dict[str, Any] = {}
    task = load_task(Path(target.task))
    writes = task.generates  # texts are their own labels, and answers may hold more or fewer tokens
    if theirs is not None and (theirs.shape == own.shape or (writes and theirs.shape[:2] == own.shape[:2])):
        found["agreement"] = float(task.agrees(own, theirs).mean())
    if not writes and not all(row.get("label") and task.labels_of(row) <= set(task.labels) for row in rows):
        return found
    found["further"] = task.further(own, rows)
    found["metric"] = Metric(*metric_interval(task, own, rows), len(rows))
    found["wrong_rows"] = wrong_rows(task, own, rows)
    if theirs is not None and "agreement" in found:
        found["mcnemar_p"] = mcnemar(task, own, theirs, rows)
    return found


def _answers(targets: list[Target], rows: list[dict[str, Any]]) -> dict[str, Array]:
    """Every row through each runtime that was measured, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as work, bar("answers for accuracy", len(targets)) as advance:
        file = Path(work) / "rows.json"
        file.write_bytes(msgspec.json.encode(rows))
        for target in targets:
            try:
                found[target.name] = logits_of(target, file)
            except Crashed as crash:
                warn(f"bench: the accuracy of {target.name} is missing: it {crash}")
            advance(1)
    return found


def _summary(measured: Measured, first: str) -> str:
    others = {name: ratio for name, ratio in measured.speedup.items() if name != first}
    if not others:
        only = measured.latency.get(first)
        return f"{first}: p50 {trimmed(only.p50, only.p50_ci95)} ms." if only else ""
    told = [
        f"{name} is {'as fast as' if ratio.verdict == 'same' else ratio.verdict + ' than'} {first}"
        if ratio.verdict != "unsure"
        else f"{name} against {first}: unsure"
        for name, ratio in others.items()
    ]
    return "; ".join(told) + "."
