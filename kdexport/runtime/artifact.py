"""The artifact folder: manifest and checksums, packing and checking.

config.json tokenizer.json …    as on the Hugging Face Hub
onnx/model.onnx                 fp32, standard operators only
onnx/model_quantized.onnx       int8
onnx/model_fp16.onnx            fp16, for GPUs
onnx/model_q4.onnx              int4 weights, of language models
onnx/encoder_model….onnx        of a recogniser that writes, with onnx/decoder_model_merged….onnx, in place of a model
golden.json                     rows, and each file's logits for them at packing
kdexport.json                   the manifest
README.md                       the model card

The manifest has the sha256 of every file that predictions depend on, and of itself. Checksums detect incomplete,
damaged or accidentally edited copies. They do not authenticate the author: whoever can write into the folder can write
the checksums too. So artifacts are untrusted: none may make a program read another file, hang it, or end it with
anything but an `ArtifactError`.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kdexport.errors import ArtifactError, MissingPackage
from kdexport.files import digest, hash_file, write_bytes, write_json
from kdexport.runtime.onnx_wire import has_external_data
from kdexport.tasks import load_task, task_class
from kdexport.tasks.config import MOST_JSON, Name, TaskConfig, read_regular

MANIFEST, GOLDEN, CARD = "kdexport.json", "golden.json", "README.md"
SCHEMA = 1
_AGAIN = "Pack the artifact again"
# File size limits in bytes. Protobuf's is 2 GiB; the largest tokenizers have about 40 MB.
_MOST_MODEL, _MOST_OTHER, _MOST_CARD = 2**31, 2**27, 2**20

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class ManifestVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One model file of an artifact, or two: an encoder and its decoder. `size_bytes` is that of both."""

    precision: Name
    file: Name
    graph: str
    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0)]
    decoder: Name = ""
    decoder_sha256: Sha256 | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`kdexport.json`: the configuration for a runtime, and how the files were made.

    `columns` maps our columns (`text`, `text_pair`, `label`, …) to the training file's, `sha256` is that of all other
    fields; older manifests have neither.
    """

    schema: int = SCHEMA
    kdexport: str
    task: TaskConfig
    recommended: Name
    variants: Annotated[dict[Name, ManifestVariant], Meta(max_length=16)]
    files: Annotated[dict[Name, Sha256], Meta(max_length=64)]
    made: dict[str, Any]
    columns: Annotated[dict[Name, Name], Meta(max_length=8)] = {}
    sha256: str = ""


class Golden(msgspec.Struct, frozen=True):
    """`golden.json`: each file's logits at packing, to verify them elsewhere.

    `logits` are [N, *answer_shape] for each variant, with `rows` run one by one, as int8 activations are scaled by the
    batch.
    """

    rows: Annotated[list[dict[str, str]], Meta(min_length=1, max_length=64)]
    logits: dict[str, list[Any]]


# File names expected by transformers.js, text-embeddings-inference and Optimum.
SHIPPED_AS = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
}
# Files of a student's folder that other tools need beside the graph.
_SHIPPED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "vocab.json", "preprocessor_config.json", "generation_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    *(f"{i}_Dense/{name}" for i in range(2, 8) for name in ("config.json", "model.safetensors")),
)  # fmt: skip


def shipped_as(precision: str, model: Path) -> str:
    """Return the name in an artifact of a model's file, or of its encoder."""
    name = SHIPPED_AS[precision]
    return name.replace("/model", "/encoder_model") if decoder_of(model) else name


def pack(
    student: Path,  # a Hugging Face folder with `task.json`
    models: dict[str, tuple[Path, str]],  # precision → (ONNX file, graph)
    recommended: str,  # the default precision
    made: dict[str, Any],  # copied into the manifest
    out: Path,
    golden: Golden | None = None,
    columns: dict[str, str] | None = None,  # our columns → the training file's
) -> None:
    """Write an artifact into the existing folder `out`."""
    from kdexport import __version__

    (out / "onnx").mkdir(exist_ok=True)
    for name in _SHIPPED:
        if (student / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(student / name, out / name)
    task = load_task(student).config
    _name_known_architecture(out / "config.json", task.task)
    variants = {}
    for precision, (file, graph) in models.items():
        name = shipped_as(precision, file)
        parts, copies = files_of(file), files_of(out / name)
        for part, copy in zip(parts, copies, strict=True):
            shutil.copyfile(part, copy)
        variants[precision] = ManifestVariant(
            precision=precision, file=name, graph=graph, sha256=hash_file(file), size_bytes=size_of(file),
            decoder=f"onnx/{copies[1].name}" if parts[1:] else "",
            decoder_sha256=hash_file(parts[1]) if parts[1:] else None,
        )  # fmt: skip
    answers = msgspec.json.encode(golden) if golden else b""
    if 0 < len(answers) <= _MOST_OTHER:  # larger ones could not be read back
        write_bytes(out / GOLDEN, answers)
    manifest = Manifest(
        kdexport=__version__,
        task=task,
        recommended=recommended,
        variants=variants,
        files={name: hash_file(out / name) for name in (*_SHIPPED, GOLDEN) if (out / name).exists()},
        made=made,
        columns=columns or {},
    )
    write_json(out / MANIFEST, sealed(msgspec.json.decode(msgspec.json.encode(manifest))))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the checksum of its content."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": digest(content)}


def _name_known_architecture(file: Path, task: str) -> None:
    """Let other runtimes load an artifact whose student has an architecture of ours.

    Optimum and transformers.js need a known family in config.json, and its labels; the model itself is the ONNX file,
    with the inputs of a BERT without token types, a ResNet, or an Audio Spectrogram Transformer. The actual
    architecture is under `kdexport`.
    """
    config = msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.exists() else {}
    stands_for = task_class(task).stands_for
    if stands_for and str(config.get("model_type", "")).startswith("kdexport-"):
        own = {"model_type": config["model_type"], "architectures": config.pop("architectures", None)}
        family, architecture = stands_for
        write_json(file, config | {"model_type": family, "architectures": [architecture], "kdexport": own})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact folder, or of the run that holds one, after checking its checksum."""
    folder = resolve(folder)
    try:
        raw = msgspec.json.decode(read_regular(folder / MANIFEST, MOST_JSON))
        if raw.get("schema") != SCHEMA:
            raise ArtifactError(f"{folder}/{MANIFEST} is of schema {raw.get('schema')}, this kdexport reads {SCHEMA}")
        if raw.get("sha256") and raw != sealed(raw):
            raise ArtifactError(f"{folder}/{MANIFEST} was changed after it was packed: its sha256 differs", _AGAIN)
        return msgspec.convert(raw, Manifest)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}", "kdexport run writes one") from None
    except (OSError, msgspec.MsgspecError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{folder}/{MANIFEST} can't be read: {error}", _AGAIN) from None


def read_columns(folder: Path) -> dict[str, str]:
    """Return our columns → the training file's; empty without an artifact, or for an older one."""
    return dict(read_manifest(folder).columns) if (resolve(folder) / MANIFEST).is_file() else {}


def read_golden(folder: Path) -> Golden | None:
    """Read the golden logits of an artifact folder; None for older ones."""
    try:
        return msgspec.json.decode(read_regular(folder / GOLDEN, _MOST_OTHER), type=Golden)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{folder}/{GOLDEN} can't be read: {error}", _AGAIN) from None


def read_card(folder: Path) -> str:
    """Return the model card, cut at 1 MiB; empty if it is missing or unreadable."""
    try:
        if not (folder / CARD).is_file():
            return ""
        with (folder / CARD).open("rb") as file:
            return file.read(_MOST_CARD).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


def split_name(name: str | Path) -> tuple[Path, str | None]:
    """Split `FOLDER[:VARIANT]`; an existing folder of the whole name takes precedence."""
    found = re.fullmatch(r"(.+):([^:/\\]*)", str(name), re.DOTALL)
    if found is None or Path(name).exists():
        return Path(name), None
    return Path(found[1]), found[2] or None


def resolve(folder: Path) -> Path:
    """Return the artifact folder of a run, or the folder itself."""
    inner = folder / "artifact"
    return inner if not (folder / MANIFEST).exists() and (inner / MANIFEST).exists() else folder


def model_file(folder: Path, variant: str | None = None) -> Path:
    """Return the file of a variant (default: the recommended one), after checking all checksums.

    All files must lie inside the folder: an artifact is untrusted, and the server publishes its card.
    """
    manifest = read_manifest(folder)
    name = variant or manifest.recommended
    chosen = manifest.variants.get(name)
    if chosen is None:
        it = "has no variant" if variant else "recommends a variant that it lacks:"
        raise ArtifactError(f"{folder} {it} {name!r}", f"It has: {', '.join(manifest.variants)}")
    sums = {**manifest.files, chosen.file: chosen.sha256}
    beside = decoder_of(Path(chosen.file))
    if (beside.as_posix() if beside else "") != chosen.decoder or (manifest.task.decoder is None) != (beside is None):
        raise ArtifactError(f"{folder}: the variant {name} does not name the decoder of its encoder", _AGAIN)
    if chosen.decoder:
        sums[chosen.decoder] = chosen.decoder_sha256 or ""
    for name in {*sums, *_SHIPPED, GOLDEN, MANIFEST, CARD}:
        _check_inside(folder, name)
    for name in {*sums, *_SHIPPED, GOLDEN}:
        _check_regular(folder / name, _MOST_MODEL if name in (chosen.file, chosen.decoder) else _MOST_OTHER)
    for name, sha256 in sums.items():
        _check(folder / name, sha256)
    for name in ("tokenizer.json", GOLDEN):
        if name not in sums and (folder / name).exists():
            raise ArtifactError(f"{folder / name} is not in the manifest, so it has no checksum", _AGAIN)
    _check_labels(folder, manifest)
    for file in files_of(folder / chosen.file):
        try:
            external = has_external_data(file)
        except ValueError as error:
            raise ArtifactError(f"{file} can't be loaded: it is no ONNX model ({error})", _AGAIN) from None
        if external:
            raise ArtifactError(f"{file} has weights in other files, which have no checksums", _AGAIN)
        if file.suffix != ".onnx":  # ONNX Runtime detects other formats by the suffix
            raise ArtifactError(f"{file} is not called .onnx", _AGAIN)
    return folder / chosen.file


@contextmanager
def only_artifact_errors(folder: Path) -> Iterator[None]:
    """Convert any error while loading an artifact to an `ArtifactError`.

    Its content drives numpy, Pillow, the tokenizer and ONNX Runtime, which raise classes of their own: MemoryError,
    RecursionError, onnxruntime's Fail, and Rust's PanicException, which is no Exception.
    """
    try:
        yield
    except (ArtifactError, MissingPackage):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip() or type(error).__name__
        raise ArtifactError(f"{folder} can't be loaded: {reason}", _AGAIN) from error


def decoder_of(model: Path) -> Path | None:
    """Return the decoder that belongs to an encoder's file, `encoder_model…onnx`; None for a model that is one file."""
    found = re.fullmatch(r"encoder_model(.*)", model.name)
    return model.with_name(f"decoder_model_merged{found[1]}") if found else None


def files_of(model: Path) -> list[Path]:
    """Return the ONNX files that a model consists of."""
    return [model, *filter(None, [decoder_of(model)])]


def size_of(model: Path) -> int:
    """Return the bytes of the ONNX files that a model consists of."""
    return sum(file.stat().st_size for file in files_of(model))


def _check_inside(folder: Path, name: str) -> None:
    """Refuse names and links that leave the folder, except those of a hub cache, `snapshots/<id>` → `blobs`."""
    try:
        home, file = folder.resolve(), (folder / name).resolve()
        cached = [p.parent / "blobs" for p in home.parents if (p.name, p.parent.name[:8]) == ("snapshots", "models--")]
        inside = file.is_relative_to(home) or (file.parent in cached and ".." not in Path(name).parts)
        inside = inside and not Path(name).is_absolute()
    except (OSError, RuntimeError, ValueError):  # a loop of links; a NUL
        inside = False
    if not inside:
        fix = "Copy the files themselves into the folder, not links"
        raise ArtifactError(f"{folder} names {name!r}, which lies outside of it", fix)


def _check_regular(path: Path, most: int) -> None:
    """Refuse files that are too large, and others than regular files: a pipe would block."""
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path} is no file", _AGAIN)
    if path.exists() and path.stat().st_size > most:
        raise ArtifactError(f"{path} has {path.stat().st_size:,} bytes; at most {most:,} are read", _AGAIN)


def _check(path: Path, sha256: str) -> None:
    try:
        found = hash_file(path)
    except OSError as error:
        raise ArtifactError(f"{path} is missing or unreadable ({error.strerror})", _AGAIN) from None
    if found != sha256:
        raise ArtifactError(f"{path} is not the file that was packed: its sha256 differs", "Pack it again")


def _check_labels(folder: Path, manifest: Manifest) -> None:
    """Compare the labels with config.json, which has a checksum even where the manifest has none."""
    if "config.json" not in manifest.files or not manifest.task.labels:
        return
    try:
        config = msgspec.json.decode(read_regular(folder / "config.json", MOST_JSON), type=dict[str, Any])
        names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    except (OSError, msgspec.MsgspecError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder}/config.json can't be read: {error}", _AGAIN) from None
    labels = dict(enumerate(manifest.task.labels))
    if names not in ({}, labels, {i: f"LABEL_{i}" for i in names}):  # LABEL_0 … are Transformers' defaults
        raise ArtifactError(f"{folder}/{MANIFEST} has other labels than its config.json", _AGAIN)
