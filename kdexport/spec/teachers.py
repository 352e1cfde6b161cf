"""The kinds of teachers, by their names and files."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from kdexport.errors import ModelError, SpecError
from kdexport.spec.sections import Spec

Kind = Literal["torch", "onnx", "stored", "zero-shot", "endpoint", "answers"]
# Kinds that answer some texts only, so that a stage of its own chooses them.
ASKED = ("endpoint", "answers")
# Kinds in whose place no other model gives weights to students.
OPEN = ("torch", "onnx")
# Kinds that know no labels but those that they are asked about.
LABELLING = (*ASKED, "zero-shot")
ZERO_SHOT = "zero-shot:"
# What students are made from where the teacher has no weights to give; it comes with `kdexport[demo]`.
BASE = "sentence-transformers/all-MiniLM-L6-v2"
_ENDPOINT, _OPENAI = "openai:", "https://api.openai.com/v1"
# The family of recognisers that write freely, so that they can transcribe for others.
TRANSCRIBER = "whisper"


def named(settings: Spec) -> tuple[str, ...]:
    """Return the teachers as the spec names them."""
    model = settings.teacher.model
    return (model,) if isinstance(model, str) else model


def kind_of(model: str) -> Kind:
    """Return a teacher's kind: a Hugging Face folder or hub id unless the files say otherwise."""
    path = Path(model)
    if model.startswith(_ENDPOINT):
        return "endpoint"
    if model.startswith(ZERO_SHOT):
        return "zero-shot"
    if path.suffix == ".jsonl":
        return "answers"
    if path.suffix in (".npz", ".parquet"):
        return "stored"
    artifact = any((path / inner / "kdexport.json").is_file() for inner in ("", "artifact"))
    return "onnx" if artifact or optimum_file(path) else "torch"


class Address(NamedTuple):
    """A language model behind an endpoint, `openai:MODEL@URL`."""

    model: str
    url: str


def address_of(teacher: str) -> Address:
    """Parse `openai:MODEL@URL`; raise SpecError for a URL that can't be one, or that holds a password."""
    model, _, url = teacher.removeprefix(_ENDPOINT).partition("@http")
    url = f"http{url}".rstrip("/") if url else _OPENAI
    fix = "Write it like openai:MODEL@http://localhost:8000/v1"
    if not model or not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url) or (url == _OPENAI and "@" in model):
        raise SpecError(f"teacher.model: {teacher!r} names no model and URL", fix)
    if "@" in url.split("/")[2]:
        raise SpecError(
            "teacher.model: the URL holds a password", "Set teacher.ask.key to a variable that holds the key"
        )
    return Address(model, url)


def asked(settings: Spec) -> bool:
    """Return whether the first teacher answers some texts only."""
    return kind_of(named(settings)[0]) in ASKED


def origin(settings: Spec) -> str:
    """Return the model whose weights students are made from: the first teacher, or one in its place."""
    first = named(settings)[0]
    return first if kind_of(first) in OPEN else settings.student.base or BASE


def optimum_file(folder: Path) -> Path | None:
    """Return the ONNX file of a folder as Optimum writes it; None where there are weights of PyTorch."""
    weights = [p for kind in ("*.safetensors", "pytorch_model*.bin", "adapter_config.json") for p in folder.glob(kind)]
    if weights or not (folder / "config.json").is_file():
        return None
    return next((folder / name for name in ("onnx/model.onnx", "model.onnx") if (folder / name).is_file()), None)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def base_of(adapter: Path) -> str:
    """Return an adapter's base model, a hub id or folder; raise ModelError if it names none."""
    try:
        base = msgspec.json.decode((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelError(f"adapter {adapter} names no base model", "Set base_model_name_or_path in adapter_config.json")
    beside = adapter / base
    return str(beside) if not Path(base).exists() and beside.is_dir() else base


def has_weights(model: str) -> bool:
    """Return whether a model's folder holds weights; a hub id is assumed to have them."""
    kinds = ("*.safetensors", "pytorch_model*.bin")
    return not Path(model).is_dir() or any(path for kind in kinds for path in Path(model).glob(kind))


def config_of(model: str, file: str = "config.json") -> dict[str, Any]:
    """Return the configuration of a model folder as it stands in its file; empty for a hub id."""
    try:
        found = msgspec.json.decode((Path(model) / file).read_bytes())
    except (OSError, ValueError, msgspec.DecodeError):  # a name with a NUL in it is a ValueError
        return {}
    return found if isinstance(found, dict) else {}
