"""`kdexport export`: a trained model, whoever trained it → an artifact, verified, without any training.

ONNX, optimised, quantized, held against PyTorch, packed: the stages are those of a run.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport import artifact, spec
from kdexport.bench.stats import ratio
from kdexport.data.sources import rows_with_texts
from kdexport.errors import ArtifactError, ModelError, RunError, SpecError
from kdexport.export import Candidate, export_student
from kdexport.export.verify import FP32_TOLERANCE, compare
from kdexport.predictor import Predictor, golden_answers
from kdexport.progress import say
from kdexport.report import write_export_card
from kdexport.results import Exported, ExportedFile
from kdexport.rundir import disk_errors, move_into_place
from kdexport.tasks import Task, load_task
from kdexport.tasks.text_classification import Arrays

# int8 is recommended when it gives fp32's answer on this share of rows, of which there must be enough.
AGREEMENT, ENOUGH_ROWS = 0.99, 100
# PyTorch has to read them, too; more rows say little more.
_MOST_ROWS = 2000
_ROUNDS, _CALLS = 7, 5


def export(
    model: str,
    out: Path,
    variants: Sequence[str] = ("fp32", "int8"),
    max_length: int | None = None,
    data: Path | None = None,
    column: str = "text",
) -> Exported:
    """Pack a trained classifier as an artifact.

    Args:
        model: Hugging Face folder or hub id of a sequence classifier: single-label, multi-label, one-label or
            regression.
        out: the artifact's folder; one that this function wrote before is replaced once the new one is complete.
        variants: precisions; fp32 is always made.
        max_length: tokens kept of each text; what the model reads, but at most 512, when None.
        data: texts to verify on, beside the task's probes and examples.
        column: the texts' column in `data`.

    Raises:
        KdexportError: the model, the data or `out` can't be used, or a file does not do what the model does.
    """
    precisions, out = _precisions(variants), out.resolve()
    check_place(out)
    if not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(f"{model} does not exist", "Name a folder written by save_pretrained")
    rows = _spread(rows_with_texts(data, column)) if data else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(out.parent), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        found = _make(model, precisions, max_length, rows, Path(work))
        move_into_place(Path(work) / "artifact", out)
    return found


def check_place(out: Path) -> None:
    """Whether a folder may be written: absent, empty, or written by `kdexport export` before.

    Raises:
        RunError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        if artifact.read_manifest(out).made.get("by") == "kdexport export" and (out / artifact.MANIFEST).exists():
            return
    except ArtifactError:
        pass
    raise RunError(f"{out} exists, and is nothing that kdexport export wrote", "Name another folder")


def _make(
    model: str, precisions: tuple[spec.Precision, ...], max_length: int | None, rows: list[dict[str, Any]], work: Path
) -> Exported:
    from kdexport.distill.trained import take_trained

    source, graphs, packed = (work / name for name in ("model", "graphs", "artifact"))
    for folder in (source, graphs, packed):
        folder.mkdir()
    take_trained(model, max_length, rows, source)
    export_student(spec.Export(variants=precisions), source, graphs)
    task = load_task(source)
    files, chosen = _verify(task, source, graphs, rows)
    recommended, reason = recommend(files, len(rows))
    found = Exported(
        model="/".join(Path(model).parts[-2:]),
        task=task.name,
        labels=task.labels,
        function=task.config.function,
        max_length=task.config.max_length,
        rows=len(rows),
        recommended=recommended,
        reason=reason,
        files=files,
    )
    made = {"by": "kdexport export"} | msgspec.to_builtins(found)
    golden = golden_answers(task, {precision: file for precision, (file, _) in chosen.items()})
    artifact.pack(source, chosen, recommended, made, packed, golden)
    write_export_card(found, packed / "README.md")
    return found


def _verify(
    task: Task, source: Path, graphs: Path, rows: list[dict[str, Any]]
) -> tuple[list[ExportedFile], dict[str, tuple[Path, str]]]:
    """Hold every file against PyTorch; the record of each that ships, and precision → (file, graph)."""
    reference = np.load(source / "reference.npy")
    everything = [*rows, *task.probes(), *task.examples()]
    allowed = FP32_TOLERANCE
    if task.config.function == "none":  # a regression's numbers may be large, and float32 has seven digits
        allowed *= max(1.0, float(np.abs(reference).max()))
    compared = {c.name: (c, logits, diff) for c, logits, diff in compare(task, graphs, everything, reference, allowed)}
    fp32 = compared["fp32"][1][: len(rows)]
    files, chosen = [], {}
    for name in _shipped(task, graphs, [c for c, _, _ in compared.values()], everything):
        candidate, logits, difference = compared[name]
        file = graphs / candidate.file
        chosen[candidate.precision] = (file, candidate.graph)
        files.append(
            ExportedFile(
                precision=candidate.precision,
                file=artifact.SHIPPED_AS[candidate.precision],
                graph=candidate.graph,
                size_bytes=file.stat().st_size,
                max_abs_diff=difference,
                agreement=float(task.agrees(logits[: len(rows)], fp32).mean()) if rows else None,
            )
        )
    say(f"verify: fp32 against PyTorch on {len(everything)} inputs: max |Δlogit| {files[0].max_abs_diff:.1e}")
    return files, chosen


def recommend(files: Sequence[ExportedFile], rows: int) -> tuple[str, str]:
    """The precision to load by default, and why.

    int8 is smaller and faster, and what it does to a model's answers differs from model to model: it is recommended
    where that was seen on enough real rows, and nowhere else.
    """
    int8 = next((file for file in files if file.precision == "int8"), None)
    if int8 is None:
        return "fp32", "int8 was not asked for"
    if int8.agreement is None:
        return "fp32", "whether int8 keeps the answers is not known without texts (--data)"
    kept = f"int8 gives fp32's answer on {int8.agreement:.1%} of {rows:,} rows"
    if rows < ENOUGH_ROWS:
        return "fp32", f"{kept}, which are too few to tell; {ENOUGH_ROWS} are needed"
    return ("int8" if int8.agreement >= AGREEMENT else "fp32"), f"{kept}; {AGREEMENT:.0%} are wanted"


def _shipped(task: Task, graphs: Path, candidates: list[Candidate], rows: list[dict[str, Any]]) -> list[str]:
    """Names of the files that ship: plain graphs, which run everywhere, but int8 fused where that is faster."""
    names = {c.precision: c.name for c in candidates if c.graph == "plain"}
    if {"int8", "int8-fused"} <= {c.name for c in candidates}:
        files = {c.name: graphs / c.file for c in candidates}
        if _faster(task, files["int8"], files["int8-fused"], rows):
            names["int8"] = "int8-fused"
    return list(names.values())


def _faster(task: Task, plain: Path, fused: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether the fused file is faster beyond doubt, at the rows' median length, one text at a time, in turns."""
    lengths = [len(next(iter(arrays.values()))) for arrays in task.tokenize(rows)]
    arrays = task.sized(rows, int(np.median(lengths)))
    times: dict[Path, list[float]] = {plain: [], fused: []}
    predictors = {file: Predictor(task, file, threads=1) for file in times}
    for _ in range(_ROUNDS):
        for file, predictor in predictors.items():
            times[file].append(_seconds(predictor, arrays))
    found = ratio(times[plain][1:], times[fused][1:])  # the first round also warms up
    return found.verdict == "faster"


def _seconds(predictor: Predictor, arrays: Arrays) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        predictor.run(arrays)
    return time.perf_counter() - started


def _precisions(variants: Sequence[str]) -> tuple[spec.Precision, ...]:
    try:
        return msgspec.convert(tuple(variants), tuple[spec.Precision, ...])
    except msgspec.ValidationError:
        raise SpecError(f"--variants {','.join(variants)!r} can't be read", "Write some of fp32,int8,fp16") from None


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 2,000 rows, spread evenly."""
    if len(rows) <= _MOST_ROWS:
        return rows
    say(f"verify: {_MOST_ROWS:,} of {len(rows):,} rows, spread evenly")
    return [rows[i * len(rows) // _MOST_ROWS] for i in range(_MOST_ROWS)]
