"""The export stage: a trained student → ONNX graphs, plain and fused, fp32, fp16 and int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.files import write_json
from kdexport.progress import say
from kdexport.tasks import load_task
from kdexport.tasks.config import Arrays


class Candidate(msgspec.Struct, frozen=True):
    """One exported file; several may stand for one precision until they are measured."""

    name: str
    file: str
    precision: str
    graph: str


# Rows whose activations are looked at for the ranges of int8.
CALIBRATION_ROWS = 320


def export_student(settings: spec.Export, student: Path, out: Path, rows: Sequence[dict[str, Any]] = ()) -> None:
    """Write every candidate file, and `candidates.json`.

    Args:
        settings: which precisions.
        student: a Hugging Face folder with `task.json`.
        out: gets `model*.onnx`.
        rows: of the training data, which int8 of convolutions is calibrated on; without any there is no such file.
    """
    from kdexport.export.fuse import fuse, trim
    from kdexport.export.onnx import export_onnx
    from kdexport.export.quantize import convolves, halve, quantize_int4, quantize_int8, quantize_static_int8

    export_onnx(student, out / "model.onnx")
    found = [Candidate("fp32", "model.onnx", "fp32", "plain")]
    fused = fuse(out / "model.onnx", student, out / "model_fused.onnx")
    if fused:
        found.append(Candidate("fp32-fused", "model_fused.onnx", "fp32", "fused"))
    trim(out / "model.onnx")  # after fusion, which looks for whole layers
    if "fp16" in settings.variants:
        halve(out / "model.onnx", out / "model_fp16.onnx")
        found.append(Candidate("fp16", "model_fp16.onnx", "fp16", "plain"))
    if "int8" in settings.variants:
        if not convolves(out / "model.onnx"):
            quantize_int8(out / "model.onnx", out / "model_quantized.onnx")
            found.append(Candidate("int8", "model_quantized.onnx", "int8", "plain"))
        elif rows:
            quantize_static_int8(out / "model.onnx", out / "model_quantized.onnx", _batches(student, rows))
            found.append(Candidate("int8", "model_quantized.onnx", "int8", "plain"))
        else:
            say("export: int8 of convolutions is calibrated on rows (--data); there are none, so it is left out")
        if fused:
            quantize_int8(out / "model_fused.onnx", out / "model_fused_quantized.onnx")
            found.append(Candidate("int8-fused", "model_fused_quantized.onnx", "int8", "fused"))
    if "int4" in settings.variants:
        quantize_int4(out / "model.onnx", out / "model_q4.onnx")
        found.append(Candidate("int4", "model_q4.onnx", "int4", "plain"))
    sizes = ", ".join(f"{c.name} {(out / c.file).stat().st_size / 1e6:.1f} MB" for c in found)
    say(f"export: {sizes}")
    write_json(out / "candidates.json", found)


def _batches(student: Path, rows: Sequence[dict[str, Any]]) -> Iterator[Arrays]:
    task, chosen = load_task(student), [rows[i] for i in sampled(len(rows), CALIBRATION_ROWS)]
    return (task.graph_inputs(task.encode(chosen[i : i + 32])) for i in range(0, len(chosen), 32))


def read_candidates(export: Path) -> list[Candidate]:
    """`candidates.json` of a finished export stage."""
    return msgspec.json.decode((export / "candidates.json").read_bytes(), type=list[Candidate])
