"""The export stage: a trained student → ONNX graphs, plain and fused, fp32, fp16 and int8."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kdexport import spec
from kdexport.progress import say
from kdexport.rundir import write_json


class Candidate(msgspec.Struct, frozen=True):
    """One exported file; several may stand for one precision until they are measured."""

    name: str
    file: str
    precision: str
    graph: str


def export_student(settings: spec.Export, student: Path, out: Path) -> None:
    """Write every candidate file, and `candidates.json`.

    Args:
        settings: which precisions.
        student: a Hugging Face folder with `task.json`.
        out: gets `model*.onnx`.
    """
    from kdexport.export.onnx import export_onnx
    from kdexport.export.optimize import fuse, trim
    from kdexport.export.quantize import halve, quantize_int8

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
        quantize_int8(out / "model.onnx", out / "model_quantized.onnx")
        found.append(Candidate("int8", "model_quantized.onnx", "int8", "plain"))
        if fused:
            quantize_int8(out / "model_fused.onnx", out / "model_fused_quantized.onnx")
            found.append(Candidate("int8-fused", "model_fused_quantized.onnx", "int8", "fused"))
    sizes = ", ".join(f"{c.name} {(out / c.file).stat().st_size / 1e6:.1f} MB" for c in found)
    say(f"export: {sizes}")
    write_json(out / "candidates.json", found)


def read_candidates(export: Path) -> list[Candidate]:
    """`candidates.json` of a finished export stage."""
    return msgspec.json.decode((export / "candidates.json").read_bytes(), type=list[Candidate])
