"""`kdexport bench`: names on the command line → targets → one report, side by side.

A name is a run, an artifact (`folder:int8` for one of its files), an ONNX file, a Hugging Face folder or hub id, or
the address of a server.
"""

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
from kdexport.data import hub, read_rows
from kdexport.data.sources import read_given
from kdexport.errors import ArtifactError, DataError, SpecError
from kdexport.output import Output
from kdexport.pipeline.report import described, on_disk, speed, weights
from kdexport.progress import bar, say, warn
from kdexport.report import write_reports
from kdexport.report.table import trimmed
from kdexport.results import Metric, Report, Variant
from kdexport.runtime import artifact
from kdexport.tasks import DEFAULT, load_task, task_class
from kdexport.tasks import names as task_names
from kdexport.tasks.base import Task
from kdexport.tasks.config import Row
from kdexport.tasks.inputs.media import inline
from kdexport.tasks.judging import mcnemar, metric_interval, wrong_rows
from kdexport.tasks.metrics import Array

_NAME = "Name a run, an artifact, a .onnx file, a model folder or an address"
FILES = ("bench.json", "samples.npz", "report.json", "report.md", "report.html")


def measure(
    names: Sequence[str], settings: spec.Bench, out: Path, *,
    texts: spec.Data | None = None, reference: str | None = None, loads: Loads | None = None,
    command: str = "", move_aside: bool = False,
) -> Report:  # fmt: skip
    """Measure the named targets, and write report.json, .md, .html, bench.json and samples.npz into `out`.

    `texts` are by default the test split of the first run named; ratios are to `reference`, by default the first
    target; `loads` are put on servers.
    """
    with Output(out, "bench", move_aside=move_aside) as folder, tempfile.TemporaryDirectory() as work:
        folder.check(*FILES)
        targets = [t for i, name in enumerate(names) for t in _find_targets(name, settings, Path(work) / str(i))]
        targets = [_numbered(t, targets[:i]) for i, t in enumerate(targets)]
        known = [t.name for t in targets]
        if reference and reference not in known:
            raise SpecError(f"--reference {reference!r} is not measured", f"It is one of: {', '.join(known)}")
        rows = read_texts(texts, names, next((t.task for t in targets if t.task), None))
        for target in targets:
            if target.runtime == "http":
                body_of(target.model, rows[:1])  # raises where the protocol can't send such rows
        # Measure one target twice, as the engine's check of itself: preferably a file, which is quick.
        quick = ("onnxruntime", "openvino", "torch")
        control = next((t.name for kind in quick for t in targets if t.runtime == kind), None)
        first = reference or known[0]
        made = folder.work("bench")
        made.mkdir(exist_ok=True)
        measured = bench(settings, targets, rows, first, 0, made, control=control, loads=loads)
        report = _report(targets, measured, rows, first, command)
        for name in ("bench.json", "samples.npz"):
            folder.replace(made / name, name)
        with contextlib.suppress(OSError):  # it may hold rounds of another call, which was interrupted
            made.rmdir()
        write_reports(report, folder)
    return report


def _read_for_any(texts: spec.Data) -> Sequence[Row]:
    """Read the rows for a server, whose task is unknown, by the first task that can."""
    errors = []
    for name in task_names():
        try:
            return read_given(texts, task_class(name), "some")[0]
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _numbered(target: Target, before: list[Target]) -> Target:
    """Number a target whose name is taken already."""
    same = sum(other.name == target.name for other in before)
    return msgspec.structs.replace(target, name=f"{target.name} #{same + 1}") if same else target


def _find_targets(name: str, settings: spec.Bench, work: Path) -> list[Target]:
    if re.match(r"https?://", name):
        return [Target(re.sub(r"^https?://", "", name), "http", "", name)]
    path, variant = artifact.split_name(name)
    folder = artifact.resolve(path)
    if (folder / artifact.MANIFEST).exists():
        label = (folder.resolve().parent if folder.name == "artifact" else folder.resolve()).name
        targets = []
        for precision in [variant] if variant else artifact.read_manifest(folder).variants:
            file = artifact.model_file(folder, precision)
            targets += of_file(f"{label}-{precision}", folder, file, settings.runtimes, settings.devices)
        return targets
    if path.suffix == ".onnx":
        if missing := [file for file in artifact.files_of(path) if not file.is_file()]:
            raise ArtifactError(f"{missing[0]} does not exist", "Check the path")
        return of_file(path.stem, _task_beside(path), path, settings.runtimes, settings.devices)
    if path.is_dir() and not (path / "config.json").exists():
        raise SpecError(f"{path} is no artifact, run or model", _NAME)
    return _model_targets(name, settings, work)


def _model_targets(name: str, settings: spec.Bench, work: Path) -> list[Target]:
    """Return a Hugging Face model in PyTorch's runtimes; its task is derived from its tokenizer and labels."""
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SpecError(f"{name} does not exist", _NAME)
    hub.check_model(name)
    from kdexport.models.loading import open_config, open_model, own_labels
    from kdexport.models.registry import task_of
    from kdexport.models.saving import save_task

    targets = of_model(Path(name).name, Path(name), settings.runtimes, settings.devices)
    if not (Path(name) / "task.json").exists():
        config = open_config(name)
        task = task_of(config, name) or DEFAULT
        labels = own_labels(config) if task_class(task).has_labels else []
        work.mkdir()
        save_task(open_model(name, config, task, labels), None, labels, work, task=task)
        targets = [msgspec.structs.replace(t, task=str(work), model=name) for t in targets]
    if not targets:
        raise SpecError(f"{name} is a PyTorch model, and no runtime of it is asked for", "Add --runtime torch")
    return targets


def _task_beside(file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / "task.json").exists() or (folder / artifact.MANIFEST).exists():
            return folder
    raise ArtifactError(f"{file} lies in no artifact: no {artifact.MANIFEST} beside it", "Name the artifact's folder")


def read_texts(texts: spec.Data | None, names: Sequence[str], task: str | None = None) -> Sequence[Row]:
    """Read the rows of a file, else the test split of the first run among the names.

    Columns are by default those of the training rows of the model in the folder `task`.
    """
    if texts:
        if task:
            known = artifact.read_columns(Path(task))
            rows: Sequence[Row] = read_given(texts, type(load_task(Path(task))), "some", known)[0]
        else:
            rows = _read_for_any(texts)
        return [{**row} | {key: inline(v) for key, v in row.items() if isinstance(v, bytes)} for row in rows]
    for name in names:
        place = artifact.split_name(name)[0]
        for run in (place, *list(place.resolve().parents)[:3]):
            if (run / "data" / "test.jsonl").is_file():
                say(f"bench: texts are those of {run}/data/test.jsonl")
                return read_rows(run / "data", "test")
    raise SpecError("there are no texts to measure with", "Name a file of real ones: --data texts.csv")


def _report(targets: list[Target], measured: Measured, rows: Sequence[Row], first: str, command: str) -> Report:
    known = [t for t in targets if t.name in measured.latency or t.name in measured.conditions.failed]
    folder = next((t.task for t in known if t.task), None)
    task = load_task(Path(folder)) if folder else None
    logits = _answers([t for t in known if t.runtime != "http" and t.name in measured.latency], rows, measured)
    return Report(
        kdexport=__version__, task=task.name if task else DEFAULT,
        **described(task.metric if task else task_class(DEFAULT).metric), recommended=None,
        labels=task.labels if task else [],
        variants=[_variant(t, measured, _quality(t, logits, rows, first) if t.name in logits else {}) for t in known],
        reason=_summary(measured, first),
        bench=measured.conditions, environment=measured.environment, command=command,
    )  # fmt: skip


def _variant(target: Target, measured: Measured, quality: dict[str, Any]) -> Variant:
    http, is_file, file = target.runtime == "http", target.model.endswith(".onnx"), Path(target.model)
    precision = re.search(r"fp16|int8|int4|quantized|q4", f"{target.name} {file.name}") if is_file else None
    size = {"size_bytes": None, "sha256": None} if http else on_disk(file) if is_file else weights(file)
    return Variant(
        name=target.name, model=target.name, runtime=target.runtime, device=target.device,
        precision={"quantized": "int8", "q4": "int4"}.get(precision[0], precision[0]) if precision else "fp32",
        graph="server" if http else "file" if is_file else "model", file=target.model, **size, **quality,
        **speed(target.name, measured),
    )  # fmt: skip


def labelled_rows(task: Task, rows: Sequence[Row], name: str) -> Sequence[Row]:
    """Return the rows, or none if any row lacks a label that the task knows."""
    for row in rows:
        if row.get("label") is None or (task.one_label and not row["label"]):
            return []
        if unknown := task.unknown(row):
            what = "character" if task.transcribes else "label"
            warn(f"bench: the {task.metric.name} of {name} is not measured: it has no {what} {min(unknown)!r}")
            return []
    return rows


def _quality(target: Target, logits: dict[str, Array], rows: Sequence[Row], first: str) -> dict[str, Any]:
    """Return agreement with the reference, and the metric where rows have labels."""
    own, theirs, task = logits[target.name], logits.get(first), load_task(Path(target.task))
    found: dict[str, Any] = {}
    # Outputs of language models, which have no labels, may differ in the last axis.
    if theirs is not None and theirs.shape != own.shape and (task.labels or theirs.shape[:2] != own.shape[:2]):
        theirs = None
    if theirs is not None:
        found["agreement"] = float(task.agrees(own, theirs).mean())
    if labelled := labelled_rows(task, rows, target.name):
        found["further"] = task.further(own, labelled)
        found["metric"] = Metric(*metric_interval(task, own, labelled), len(labelled))
        found["wrong_rows"] = wrong_rows(task, own, labelled)
        found["mcnemar_p"] = None if theirs is None else mcnemar(task, own, theirs, labelled)
    return found


def _answers(targets: list[Target], rows: Sequence[Row], measured: Measured) -> dict[str, Array]:
    """Return the logits of every row from each target, by its name."""
    found = {}
    with tempfile.TemporaryDirectory() as work, bar("answers for accuracy", len(targets)) as advance:
        file = Path(work) / "rows.json"
        file.write_bytes(msgspec.json.encode(list(rows)))
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
