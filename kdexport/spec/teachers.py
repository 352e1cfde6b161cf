"""The kinds of teachers, by their names and files, and what each of them can't do."""

from pathlib import Path
from typing import Literal

import msgspec

from kdexport.errors import ModelError, SpecError
from kdexport.spec import derive
from kdexport.spec.sections import Spec
from kdexport.tasks.menus import OF_LAYERS, Menu

Kind = Literal["torch", "onnx", "stored"]

_NAMES = {"torch": "a model", "adapter": "an adapter", "onnx": "an ONNX file", "stored": "a file of logits"}


def named(settings: Spec) -> tuple[str, ...]:
    """Return the teachers as the spec names them."""
    model = settings.teacher.model
    return (model,) if isinstance(model, str) else model


def kind_of(model: str) -> Kind:
    """Return a teacher's kind: a Hugging Face folder or hub id unless the files say otherwise."""
    path = Path(model)
    if path.suffix in (".npz", ".parquet"):
        return "stored"
    artifact = any((path / inner / "kdexport.json").is_file() for inner in ("", "artifact"))
    return "onnx" if artifact or optimum_file(path) else "torch"


def optimum_file(folder: Path) -> Path | None:
    """Return the ONNX file of a folder as Optimum writes it; None where there are weights of PyTorch."""
    weights = [p for kind in ("*.safetensors", "pytorch_model*.bin", "adapter_config.json") for p in folder.glob(kind)]
    if weights or not (folder / "config.json").is_file():
        return None
    return next((folder / name for name in ("onnx/model.onnx", "model.onnx") if (folder / name).is_file()), None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
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


def check_teachers(spec: Spec, menu: Menu, losses: set[str]) -> None:
    """Raise a SpecError for the first setting that the teachers, or the task, don't offer."""
    teacher, models = spec.teacher, named(spec)
    kinds = {model: kind_of(model) for model in models}
    first = kinds[models[0]]
    if len(models) > 1 and teacher.weights is not None and len(teacher.weights) != len(models):
        raise SpecError(
            f"teacher.weights: {len(teacher.weights)} numbers for {len(models)} teachers", "Give one for each"
        )
    if not menu.ensemble and (len(models) > 1 or teacher.passes > 1):
        raise SpecError(f"teacher.model: {spec.task} takes one teacher, which reads each text once", "Name one")
    if not menu.augment and teacher.passes > 1 and teacher.noise == "augment":
        raise SpecError(f"teacher.noise: augment changes texts, not the rows of {spec.task}", "Take dropout")
    for model, kind in kinds.items():
        exact = "adapter" if kind == "torch" and is_adapter(Path(model)) else kind
        what = f"{_NAMES[exact]} ({model})"
        if exact not in menu.teachers:
            raise SpecError(
                f"teacher.model: for {spec.task} it can't be {what} yet", "Name a Hugging Face folder or id"
            )
        if kind != "torch" and teacher.train is not None:
            raise SpecError(f"teacher.train: {what} can't be fine-tuned", "Leave teacher.train out")
        if kind != "torch" and teacher.passes > 1 and (kind == "stored" or teacher.noise == "dropout"):
            fix = "Leave teacher.passes out" if kind == "stored" else "Take teacher.noise: augment"
            raise SpecError(f"teacher.passes: {what} has no dropout to read with", fix)
        if kind == "stored" and spec.distill.augment is not None:
            raise SpecError(f"distill.augment: {what} holds no answers to changed texts", "Leave it out")
    if first == "torch":
        return
    what = f"{_NAMES[first]} ({models[0]})"
    for student in derive.students(spec):
        if derive.shape_of(student).kind != "model":
            fix = "Name a Hugging Face folder or id for the student, or another teacher first"
            raise SpecError(f"student.model: {student!r} is built from the teacher's weights, and {what} has none", fix)
    if layers := sorted(losses & {*OF_LAYERS}):
        raise SpecError(f"distill.loss: {layers[0]} reads the teacher's layers, and {what} shows none", "Take kl")
