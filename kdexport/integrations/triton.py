"""An artifact as a Triton model repository.

Tested with Triton 2.51, in nvidia-pytriton 0.7's build for CPUs: both configurations load, warm-up runs, and the text
model answers as kdexport does, in batches under load. As that build has no ONNX Runtime backend, a Python model ran the
ONNX file.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from kdexport.files import write_bytes, write_json, write_text
from kdexport.integrations import render
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Tensor, tensors_of
from kdexport.tasks import load_task
from kdexport.tasks.base import Task, can_embed

# Files of a model that we own; other versions may stand beside version 1.
NAMES = ("1", "config.pbtxt", "labels.txt", "warmup")

_WARM_UP_TOKENS = 32
_TYPES = {"int64": "TYPE_INT64", "float": "TYPE_FP32"}


def write(folder: Path, variant: str | None, name: str, out: Path) -> None:
    """Write two models into the repository `out`: `name` (tensors → outputs) and `name_text` (texts → answers)."""
    file, task = artifact.model_file(folder, variant), load_task(folder)
    tensors, texts = out / name, out / f"{name}_text"
    for model in (tensors, texts):
        (model / "1").mkdir(parents=True)
        write_text(model / "labels.txt", "".join(f"{' '.join(label.split())}\n" for label in task.labels))
    shutil.copyfile(file, tensors / "1" / "model.onnx")
    warm_up = _write_warm_up(task, tensors / "warmup")
    write_text(tensors / "config.pbtxt", _config(name, *tensors_of(file), warm_up, task.has_labels))

    shutil.copyfile(folder / "tokenizer.json", texts / "1" / "tokenizer.json")
    shutil.copyfile(Path(__file__).with_name("triton_text.py"), texts / "1" / "model.py")
    write_json(texts / "1" / "task.json", task.config)
    width = task.width if can_embed(task) else 0
    outputs = {"output": task.output, "labels": len(task.labels), "width": width}
    text_config = render("text.pbtxt.j2", {"quoted": _quoted}, name=name, **outputs)
    write_text(texts / "config.pbtxt", text_config)


def _config(
    name: str, inputs: list[Tensor], outputs: list[Tensor], warm_up: dict[str, tuple[str, int]], labels: bool = True
) -> str:
    filters: dict[str, Callable[..., str]] = {"quoted": _quoted, "dims": _dims}
    tensors = {"inputs": inputs, "outputs": outputs, "warm_up": warm_up}
    return render("tensors.pbtxt.j2", filters, name=name, types=_TYPES, labels=labels, **tensors)


def _dims(tensor: Tensor) -> str:
    return ", ".join(str(-1 if size is None else size) for size in tensor.shape[1:])


def _quoted(text: str) -> str:
    """Quote a string for protobuf's text format, with special bytes in octal."""
    inner = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(inner)}"'


def _write_warm_up(task: Task, folder: Path) -> dict[str, tuple[str, int]]:
    """Write a real text's tensors as raw bytes; return input → (file, length)."""
    folder.mkdir()
    length = min(_WARM_UP_TOKENS, task.config.max_length)
    found = {}
    for i, (name, array) in enumerate(task.sized(task.examples(), length).items()):
        found[name] = (f"input-{i}", length)  # a graph may call its tensors anything, ../ included
        write_bytes(folder / f"input-{i}", array.astype("<i8").tobytes())
    return found
