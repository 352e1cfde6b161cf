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
from kdexport.bench.engine import GRACE_S, Measured, bench
from kdexport.bench.generator import body_of
from kdexport.bench.loads import Loads
from kdexport.bench.process import Crashed
from kdexport.bench.subjects import Target, of_file, of_model
from kdexport.bench.worker import logits_of
from kdexport.data import read_rows
from kdexport.data.sources import rows_with_texts
from kdexport.errors import ArtifactError, SpecError
from kdexport.output import Output
from kdexport.pipeline.report import described, on_disk, speed, weights
from kdexport.progress import bar, say, warn
from kdexport.report import write_reports
from kdexport.report.table import trimmed
from kdexport.results import Metric, Report, Variant
from kdexport.runtime import artifact
from kdexport.tasks import Task, load_task
from kdexport.tasks.classes import Classes
from kdexport.tasks.judging import mcnemar, metric_interval, wrong_rows
from kdexport.tasks.metrics import Array

_NAME = "Name a run, an artifact, a .onnx file, a model folder or an address"
FILES = ("bench.json", "samples.npz", "report.json", "report.md", "report.html")


def measure(
    names: Sequence[str],
    settings: spec.Bench,
    out: Path,
    *,
    texts: Path | None = None,
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
        texts: a file of texts (with labels, accuracy is taken too); by default a named run's test split.
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
        targets = [_numbered(t, targets[:i]) for i, t in enumerate(targets)]
        known = [t.name for t in targets]
        if reference and reference not in known:
            raise SpecError(f"--reference {reference!r} is not measured", f"It is one of: {', '.join(known)}")
        rows = read_texts(texts, names)
        for target in targets:
            if target.runtime == "http":
                body_of(target.model, rows[:1])  # refuses what the protocol can't send
        # One of them is measured twice, as the engine's check of itself.
        quick = ("onnxruntime", "openvino", "torch")  # a twin costs as much as its model: best a file
        control = next((t.name for kind in quick for t in targets if t.runtime == kind), None)
        first = reference or known[0]
        made = folder.work("bench")
        made.mkdir(exist_ok=True)
        measured = bench(settings, targets, rows, first, 0, made, control=control, loads=loads)
        report = _report(targets, measured, rows, first, command, as_read=texts is not None)
        for name in ("bench.json", "samples.npz"):
            folder.replace(made / name, name)
        with contextlib.suppress(OSError):  # rounds of an interrupted call of other targets may go on
            made.rmdir()
        write_reports(report, folder)
    return report


def _numbered(target: Target, before: list[Target]) -> Target:
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
    place, _, variant = name.partition(":") if not Path(name).exists() else (name, "", "")
    folder = artifact.resolve(Path(place))
    if (folder / artifact.MANIFEST).exists():
        return _artifact_targets(folder, variant, settings)
    path = Path(place)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist", "Check the path")
        return of_file(path.stem, _task_beside(path), path, settings.runtimes, settings.devices)
    if path.is_dir() and not (path / "config.json").exists():
        raise SpecError(f"{path} is no artifact, run or model", _NAME)
    return _model_targets(name, settings, work)


def _artifact_targets(folder: Path, variant: str, settings: spec.Bench) -> list[Target]:
    manifest = artifact.read_manifest(folder)
    if variant and variant not in manifest.variants:
        raise ArtifactError(f"{folder} has no variant {variant!r}", f"It has: {', '.join(manifest.variants)}")
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
        raise SpecError(f"{name} does not exist", _NAME)
    from kdexport.models.loading import open_config, open_model, own_labels
    from kdexport.models.registry import task_of
    from kdexport.models.saving import save_task

    label = Path(name).name
    if (Path(name) / "task.json").exists():
        targets = of_model(label, Path(name), settings.runtimes, settings.devices)
    else:
        config = open_config(name)
        work.mkdir()
        task = task_of(config) or "text-classification"
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


def read_texts(texts: Path | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the file that was given, else of the test split of the first run among the names.

    Raises:
        SpecError: there is neither. DataError: the file holds no texts.
    """
    if texts:
        return rows_with_texts(texts)
    for name in names:
        place = Path(name if Path(name).exists() else name.partition(":")[0])
        for run in (place, *list(place.resolve().parents)[:3]):
            if (run / "data" / "test.jsonl").is_file():
                say(f"bench: texts are those of {run}/data/test.jsonl")
                return read_rows(run / "data", "test")
    raise SpecError("there are no texts to measure with", "Name a file of real ones: --data texts.csv")


def _report(
    targets: list[Target], measured: Measured, rows: list[dict[str, Any]], first: str, command: str, as_read: bool
) -> Report:
    known = [t for t in targets if t.name in measured.latency or t.name in measured.conditions.failed]
    task = load_task(Path(next((t.task for t in known if t.task), ""))) if any(t.task for t in known) else None
    logits = _answers([t for t in known if t.runtime != "http" and t.name in measured.latency], rows, measured)
    variants = [_variant(t, measured) for t in known]
    quality = {t.name: _quality(t, logits, rows, first, as_read) for t in known if t.name in logits}
    return Report(
        kdexport=__version__, task=task.name if task else "text-classification",
        **described(task.metric if task else Classes.metric), labels=task.labels if task else [], recommended=None,
        variants=[msgspec.structs.replace(v, **quality.get(v.name, {})) for v in variants],
        reason=_summary(measured, first),
        bench=measured.conditions, environment=measured.environment, command=command,
    )  # fmt: skip


def _variant(target: Target, measured: Measured) -> Variant:
    http, is_file, file = target.runtime == "http", target.model.endswith(".onnx"), Path(target.model)
    precision = re.search(r"fp16|int8|int4|quantized|q4", f"{target.name} {file.name}") if is_file else None
    size = {"size_bytes": None, "sha256": None} if http else on_disk(file) if is_file else weights(file)
    return Variant(
        name=target.name, model=target.name, runtime=target.runtime, device=target.device,
        precision={"quantized": "int8", "q4": "int4"}.get(precision[0], precision[0]) if precision else "fp32",
        graph="server" if http else "file" if is_file else "model", file=target.model, **size,
        **speed(target.name, measured),
    )  # fmt: skip


def labelled_rows(task: Task, rows: list[dict[str, Any]], as_read: bool, name: str) -> list[dict[str, Any]]:
    """The rows with their labels as the task writes them; none where a row has no label, or one it does not know.

    `as_read` rows are those of a user's file.
    """
    found = []
    for row in rows:
        ready: Any = row | {"label": row.get("label")}
        ready = task.canonical(ready) if as_read and not task.has_words else ready
        wrong = ready if isinstance(ready, str) else ""
        if not wrong and (ready["label"] is None or (task.one_label and not ready["label"])):
            return []
        if not wrong and (unknown := task.labels_of(ready) - set(task.labels)):
            wrong = f"it has no label {min(unknown)!r}"
        if wrong:
            warn(f"bench: the {task.metric.name} of {name} is not taken: {wrong}")
            return []
        found.append(ready)
    return found


def _quality(
    target: Target, logits: dict[str, Array], rows: list[dict[str, Any]], first: str, as_read: bool
) -> dict[str, Any]:
    """Agreement with the reference, and the metric where rows have labels."""
    own, theirs, task = logits[target.name], logits.get(first), load_task(Path(target.task))
    found: dict[str, Any] = {}
    # Answers without labels, of language models, may hold more or fewer tokens in the last axis.
    if theirs is not None and theirs.shape != own.shape and (task.labels or theirs.shape[:2] != own.shape[:2]):
        theirs = None
    if theirs is not None:
        found["agreement"] = float(task.agrees(own, theirs).mean())
    if labelled := labelled_rows(task, rows, as_read, target.name):
        found["further"] = task.further(own, labelled)
        found["metric"] = Metric(*metric_interval(task, own, labelled), len(labelled))
        found["wrong_rows"] = wrong_rows(task, own, labelled)
        found["mcnemar_p"] = None if theirs is None else mcnemar(task, own, theirs, labelled)
    return found


def _answers(targets: list[Target], rows: list[dict[str, Any]], measured: Measured) -> dict[str, Array]:
    """Every row through each runtime that was measured, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as work, bar("answers for accuracy", len(targets)) as advance:
        file = Path(work) / "rows.json"
        file.write_bytes(msgspec.json.encode(rows))
        for target in targets:
            expected = len(rows) * measured.latency[target.name].p50 / 1e3
            try:
                found[target.name] = logits_of(target, file, GRACE_S + 10 * expected)
            except Crashed as crash:
                warn(f"bench: the accuracy of {target.name} is missing: it {crash}")
            advance(1)
    return found


def _summary(measured: Measured, first: str) -> str:
    others = {name: ratio for name, ratio in measured.speedup.items() if name != first}
    if not others:
        only = measured.latency.get(first)
        return f"{first}: p50 {trimmed(only.p50, only.p50_ci95)} ms." if only else ""
    says = {"same": "{} is as fast as {}", "unsure": "{} against {}: unsure"}
    parts = [says.get(r.verdict, "{} is " + r.verdict + " than {}").format(name, first) for name, r in others.items()]
    return "; ".join(parts) + "."
