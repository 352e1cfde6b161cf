"""The folder that ships: manifest, checksums, open and check.

config.json tokenizer.json …    as on the Hugging Face Hub
onnx/model.onnx                 fp32, standard operators only
onnx/model_quantized.onnx       int8
onnx/model_fp16.onnx            fp16, for GPUs
onnx/model_q4.onnx              int4 weights, of language models
golden.json                     rows, and the logits that each file gave for them when it was packed
kdexport.json                   the manifest
README.md                       the model card
"""

from __future__ import annotations

import mmap
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec

from kdexport.errors import ArtifactError
from kdexport.files import hash_file, write_json
from kdexport.tasks import load_task
from kdexport.tasks.config import TaskConfig

MANIFEST, GOLDEN, CARD = "kdexport.json", "golden.json", "README.md"
SCHEMA = 1
_AGAIN = "Pack the artifact again"


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

    `logits` are [N, *answer_shape] for each variant, of `rows` one by one: int8 activations are scaled by the batch.
    """

    rows: list[dict[str, str]]
    logits: dict[str, list[Any]]


# Names that transformers.js, text-embeddings-inference and Optimum look for.
SHIPPED_AS = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
}

# What of a student's folder other tools want beside the graph.
_SHIPPED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "preprocessor_config.json",
)  # fmt: skip

# What stands before the key `location` of a tensor whose weights are in another file: protobuf's tag of a first
# field, and the key's length, each in the shortest form or in longer ones that are read alike.
_KEY = re.compile(rb"(?:\x0a|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)\Z")


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
    task = load_task(student).config
    _name_known_architecture(out / "config.json", task.task)
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
        task=task,
        recommended=recommended,
        variants=variants,
        files={name: hash_file(out / name) for name in (*_SHIPPED, GOLDEN) if (out / name).exists()},
        made=made,
    )
    write_json(out / MANIFEST, manifest)


_STANDS_FOR = {
    "text-classification": ("bert", "BertForSequenceClassification"),
    "token-classification": ("bert", "BertForTokenClassification"),
    "image-classification": ("resnet", "ResNetForImageClassification"),
    "audio-classification": ("audio-spectrogram-transformer", "ASTForAudioClassification"),
}


def _name_known_architecture(file: Path, task: str) -> None:
    """Let other runtimes open an artifact whose student is an architecture of ours.

    Optimum and transformers.js look in config.json for a family that they know, and take the labels; the model is
    the ONNX file, whose inputs are those of a BERT without token types, of a ResNet, or of an Audio Spectrogram
    Transformer. What the student is stands in `kdexport`.
    """
    config = msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.exists() else {}
    if str(config.get("model_type", "")).startswith("kdexport-"):
        own = {"model_type": config["model_type"], "architectures": config.pop("architectures", None)}
        family, architecture = _STANDS_FOR[task]
        write_json(file, config | {"model_type": family, "architectures": [architecture], "kdexport": own})


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
    except (OSError, msgspec.MsgspecError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{folder}/{MANIFEST} can't be read: {error}", _AGAIN) from None


def read_golden(folder: Path) -> Golden | None:
    """The golden answers of an artifact folder; older ones have none.

    Raises:
        ArtifactError: they can't be read.
    """
    try:
        return msgspec.json.decode((folder / GOLDEN).read_bytes(), type=Golden)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{folder}/{GOLDEN} can't be read: {error}", _AGAIN) from None


def resolve(folder: Path) -> Path:
    """The artifact folder itself, where the run that holds it was named."""
    inner = folder / "artifact"
    return inner if not (folder / MANIFEST).exists() and (inner / MANIFEST).exists() else folder


def model_file(folder: Path, variant: str | None = None) -> Path:
    """The file of a variant, after it and the tokenizer's files were checked against the manifest's sha256.

    Nothing that is read of an artifact may lie elsewhere: an artifact may come from anybody, and the server shows
    its card to everybody.

    Args:
        folder: an artifact folder.
        variant: `fp32`, `int8`, …; the recommended one when None.

    Raises:
        ArtifactError: a file is missing, was changed or lies outside of the folder, the model has weights in other
            files, or there is no such variant.
    """
    manifest = read_manifest(folder)
    chosen = manifest.variants.get(variant or manifest.recommended)
    if chosen is None:
        raise ArtifactError(f"{folder} has no variant {variant!r}", f"It has: {', '.join(manifest.variants)}")
    sums = {**manifest.files, chosen.file: chosen.sha256}
    for name in {*sums, *_SHIPPED, GOLDEN, MANIFEST, CARD}:
        _check_inside(folder, name)
    for name, sha256 in sums.items():
        _check(folder / name, sha256)
    if _has_external_data(folder / chosen.file):
        raise ArtifactError(f"{folder / chosen.file} has weights in other files, which nobody checked", _AGAIN)
    return folder / chosen.file


def _check_inside(folder: Path, name: str) -> None:
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve()) and not Path(name).is_absolute()
    except (OSError, RuntimeError, ValueError):  # a loop of links; a NUL
        inside = False
    if not inside:
        raise ArtifactError(
            f"{folder} names {name!r}, which lies outside of it", "Copy the files themselves into the folder, not links"
        )


def _has_external_data(model: Path) -> bool:
    """Whether an ONNX file keeps weights in other files. ONNX Runtime would read any beside it, listed or not."""
    if not model.stat().st_size:  # which can't be mapped
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(b"location")
        while at >= 0:
            if _KEY.search(data[max(0, at - 20) : at]):
                return True
            at = data.find(b"location", at + 1)
    return False


def _check(path: Path, sha256: str) -> None:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ArtifactError(f"{path} is no file", _AGAIN)
        found = hash_file(path)
    except OSError as error:
        raise ArtifactError(f"{path} is missing or unreadable ({error.strerror})", _AGAIN) from None
    if found != sha256:
        raise ArtifactError(f"{path} is not the file that was packed: its sha256 differs", "Pack it again")
