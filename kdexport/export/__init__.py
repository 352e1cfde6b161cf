"""The export stage: a trained student → ONNX graphs, plain and fused or dynamo's, in several precisions."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.errors import ModelError
from kdexport.files import write_json
from kdexport.progress import say
from kdexport.runtime.artifact import files_of, size_of
from kdexport.tasks import load_task
from kdexport.tasks.base import writes_speech
from kdexport.tasks.config import Arrays, Row


class Candidate(msgspec.Struct, frozen=True):
    """One exported file; several may stand for one precision until they are measured."""

    name: str
    file: str
    precision: str
    graph: str


CALIBRATION_ROWS = 320


def export_student(settings: spec.Export, student: Path, out: Path, rows: Sequence[Row] = ()) -> None:
    """Write every candidate file `model*.onnx`, and `candidates.json`.

    Beside the plain graph stands one that may be faster: fused, or where ONNX Runtime fuses no attention, dynamo's.

    Args:
        student: a Hugging Face folder with `task.json`.
        rows: training rows for the calibration of int8 convolutions; without any there is no such file.
    """
    from kdexport.export.fuse import attends, fuse, trim
    from kdexport.export.onnx import export_onnx, fusable
    from kdexport.export.quantize import convolves, halve, quantize_int4, quantize_int8, quantize_static_int8, recurs

    if writes_speech(load_task(student)):
        return _export_writer(settings, student, out)
    plain, fused, dynamo = (out / f"{stem}.onnx" for stem in ("model", "model_fused", "model_dynamo"))
    graphs = {"plain": plain}
    exporter = export_onnx(student, plain)
    if (size := fusable(student)) and fuse(plain, fused, *size):
        graphs["fused"] = fused
    elif exporter == "torchscript" and attends(plain):
        with suppress(ModelError):
            export_onnx(student, dynamo, ["dynamo"])
            trim(dynamo)
            graphs["dynamo"] = dynamo
    trim(plain)  # after fusion, which looks for whole layers
    found: list[Candidate] = []

    def made(precision: str, graph: str, suffix: str = "") -> Path:
        """Add a candidate, and return its file."""
        name = precision if graph == "plain" else f"{precision}-{graph}"
        found.append(Candidate(name, f"{graphs[graph].stem}{suffix}.onnx", precision, graph))
        return out / found[-1].file

    for graph in graphs:
        made("fp32", graph)
    if "fp16" in settings.variants:
        halve(plain, made("fp16", "plain", "_fp16"))
    if "int8" in settings.variants:
        if recurs(plain):
            say("export: int8 makes recurrent layers over sound neither smaller nor faster, so there is no int8 file")
        elif not convolves(plain):
            for graph, file in graphs.items():
                quantize_int8(file, made("int8", graph, "_quantized"))
        elif rows:
            quantize_static_int8(plain, made("int8", "plain", "_quantized"), _batches(student, rows))
        else:
            say("export: int8 of convolutions needs rows for calibration (--data), so there is no int8 file")
    if "int4" in settings.variants:
        for graph, file in graphs.items():
            quantize_int4(file, made("int4", graph, "_q4"))
    _write_candidates(found, out)


def _export_writer(settings: spec.Export, student: Path, out: Path) -> None:
    """Write an encoder and a decoder for each candidate; that of int8 may have a decoder in fp32, if that is faster."""
    from kdexport.export.merge import read_quantized_table
    from kdexport.export.quantize import quantize_int8
    from kdexport.export.speech import export_speech, merge_decoders

    found = [Candidate("fp32", "encoder_model.onnx", "fp32", "plain")]
    encoder, decoder = files_of(out / found[0].file)
    with tempfile.TemporaryDirectory(dir=out) as work:
        first, later = export_speech(student, encoder, Path(work))
        merge_decoders(first, later, decoder)
        if "int8" in settings.variants:
            found += [
                Candidate("int8", "encoder_model_quantized.onnx", "int8", "plain"),
                Candidate("int8-mixed", "encoder_model_mixed.onnx", "int8", "mixed"),
            ]
            quantized, mixed = (files_of(out / candidate.file) for candidate in found[1:])
            quantize_int8(encoder, quantized[0])
            for file in (first, later):
                quantize_int8(file, file)
                read_quantized_table(file)
            merge_decoders(first, later, quantized[1])
            shutil.copyfile(quantized[0], mixed[0])
            shutil.copyfile(decoder, mixed[1])
    _write_candidates(found, out)


def _write_candidates(found: list[Candidate], out: Path) -> None:
    say(f"export: {', '.join(f'{c.name} {size_of(out / c.file) / 1e6:.1f} MB' for c in found)}")
    write_json(out / "candidates.json", found)


def _batches(student: Path, rows: Sequence[Row]) -> Iterator[Arrays]:
    task, chosen = load_task(student), [rows[i] for i in sampled(len(rows), CALIBRATION_ROWS)]
    return (task.graph_inputs(task.encode(chosen[i : i + 32])) for i in range(0, len(chosen), 32))


def read_candidates(export: Path) -> list[Candidate]:
    """Read `candidates.json` of a finished export stage."""
    return msgspec.json.decode((export / "candidates.json").read_bytes(), type=list[Candidate])
