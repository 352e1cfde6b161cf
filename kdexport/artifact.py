"""The folder that ships: manifest, checksums, open and check.

config.json tokenizer.json …    as on the Hugging Face Hub
onnx/model.onnx                 fp32, standard operators only
onnx/model_quantized.onnx       int8
onnx/model_fp16.onnx            fp16, for GPUs
golden.json                     rows, and the logits that each file gave for them when it was packed
kdexport.json                   the manifest
README.md                       the model card
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from kdexport.errors import ArtifactError
from kdexport.rundir import hash_file, write_json
from kdexport.tasks import load_task
from kdexport.tasks.text_classification import TaskConfig

MANIFEST, GOLDEN = "kdexport.json", "golden.json"
SCHEMA = 1


class ManifestVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One model file of an artifact."""

    precision: str
    file: str
    graph: str
    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`kdexport.json`: all that a runtime needs to know, and how the files came to be."""

    schema: int = SCHEMA
    kdexport: str
    task: TaskConfig
    recommended: str
    variants: dict[str, ManifestVariant]
    files: dict[str, str]
    made: dict[str, Any]


class Golden(msgspec.Struct, frozen=True):
    """`golden.json`: what the files answered when they were packed, to see that they still do elsewhere.

    `logits` are [N, C] for each variant, of `rows` one by one: the activations of int8 are scaled by the batch.
    """

    rows: list[dict[str, str]]
    logits: dict[str, list[list[float]]]


# Names that transformers.js, text-embeddings-inference and Optimum look for.
SHIPPED_AS = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"}

# What of a student's folder other tools want beside the graph.
_SHIPPED = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def pack(
    student: Path,
    models: dict[str, tuple[Path, str]],
    recommended: str,
    made: dict[str, Any],
    out: Path,
    golden: Golden | None = None,
) -> None:
    """Write an artifact folder.

    Args:
        student: its Hugging Face folder, with `task.json`.
        models: precision → (ONNX file, graph).
        recommended: the precision that is loaded when none is named.
        made: how it was made; goes into the manifest as it is.
        out: an existing folder.
        golden: what the files answer, as `predictor.golden_answers` finds it.
    """
    from kdexport import __version__

    (out / "onnx").mkdir(exist_ok=True)
    for name in _SHIPPED:
        if (student / name).exists():
            shutil.copyfile(student / name, out / name)
    variants = {}
    for precision, (file, graph) in models.items():
        shutil.copyfile(file, out / SHIPPED_AS[precision])
        variants[precision] = ManifestVariant(
            precision=precision,
            file=SHIPPED_AS[precision],
            graph=graph,
            sha256=hash_file(file),
            size_bytes=file.stat().st_size,
        )
    if golden:
        write_json(out / GOLDEN, golden)
    manifest = Manifest(
        kdexport=__version__,
        task=load_task(student).config,
        recommended=recommended,
        variants=variants,
        files={name: hash_file(out / name) for name in (*_SHIPPED, GOLDEN) if (out / name).exists()},
        made=made,
    )
    write_json(out / MANIFEST, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder, or of the run that holds one.

    Raises:
        ArtifactError: there is none, or it is of another schema.
    """
    folder = resolve(folder)
    try:
        raw = msgspec.json.decode((folder / MANIFEST).read_bytes())
        if raw.get("schema") != SCHEMA:
            raise ArtifactError(f"{folder}/{MANIFEST} is of schema {raw.get('schema')}, this kdexport reads {SCHEMA}")
        return msgspec.convert(raw, Manifest)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}", "kdexport run writes one") from None
    except (OSError, msgspec.MsgspecError, AttributeError) as error:
        raise ArtifactError(f"{folder}/{MANIFEST} can't be read: {error}", "Pack the artifact again") from None


def read_golden(folder: Path) -> Golden | None:
    """The golden answers of an artifact folder; older ones have none.

    Raises:
        ArtifactError: they can't be read.
    """
    try:
        return msgspec.json.decode((folder / GOLDEN).read_bytes(), type=Golden)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"{folder}/{GOLDEN} can't be read: {error}", "Pack the artifact again") from None


def resolve(folder: Path) -> Path:
    """The artifact folder itself, where the run that holds it was named."""
    inner = folder / "artifact"
    return inner if not (folder / MANIFEST).exists() and (inner / MANIFEST).exists() else folder


def model_file(folder: Path, variant: str | None = None) -> Path:
    """The file of a variant, after it and the tokenizer's files were checked against the manifest's sha256.

    Args:
        folder: an artifact folder.
        variant: `fp32`, `int8`, …; the recommended one when None.

    Raises:
        ArtifactError: a file is missing or was changed, or there is no such variant.
    """
    manifest = read_manifest(folder)
    chosen = manifest.variants.get(variant or manifest.recommended)
    if chosen is None:
        raise ArtifactError(f"{folder} has no variant {variant!r}", f"It has: {', '.join(manifest.variants)}")
    for name, sha256 in {chosen.file: chosen.sha256, **manifest.files}.items():
        _check(folder / name, sha256)
    return folder / chosen.file


def _check(path: Path, sha256: str) -> None:
    try:
        found = hash_file(path)
    except OSError as error:
        raise ArtifactError(f"{path} is missing or unreadable ({error.strerror})", "Pack the artifact again") from None
    if found != sha256:
        raise ArtifactError(f"{path} is not the file that was packed: its sha256 differs", "Pack it again")
