"""The Auto class that opens a task's models."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from transformers import AutoConfig, PreTrainedModel

import kdexport.models.convnet
import kdexport.models.speechnet
import kdexport.models.textnet  # noqa: F401  # the Auto classes learn of our own architectures
from kdexport.models.embedder import Embedder, Steps, is_embedder
from kdexport.models.transcriber import Transcriber, is_transcriber
from kdexport.tasks import DEFAULT, load_task, names, task_class
from kdexport.tasks.base import Task
from kdexport.tasks.config import read_config


def auto_class(task: str) -> Any:
    """Return the Auto class of transformers that opens a task's models."""
    return getattr(transformers, task_class(task).auto_class)


def random_model(config: Any, task: str) -> PreTrainedModel:
    """Return a model with random weights."""
    model = auto_class(task).from_config(config)
    return Embedder(model, Steps()) if task_class(task).embeds else model


def outline(config: Any, task: str) -> PreTrainedModel:
    """Return a model without weights."""
    with torch.device("meta"):
        return random_model(config, task)


def has_head(config: Any, task: str) -> bool:
    """Return whether the configuration's architecture has a head for the task."""
    kinds = task_class(task).kinds().values()
    named = any(head in name for name in config.architectures or [] for kind in kinds for head in kind.heads)
    return named and any(type(config) in getattr(transformers, kind.auto_class)._model_mapping for kind in kinds)


def task_of(config: Any, model: str | Path) -> str | None:
    """Return the task that a Hugging Face model was trained for; None where it has no head that we know."""
    found = [task for task in names() if has_head(config, task)]
    marked = (task for task in found if any(hasattr(config, mark) for mark in task_class(task).marks))
    embeds = (task for task in names() if task_class(task).embeds and is_embedder(model))
    return next(iter([*marked, *embeds, *found]), None)  # an embedder may name the head of a language model


def other_task(config: Any) -> str | None:
    """Return the Hub's name of the task of an architecture whose task is none of ours."""
    from optimum.exporters.tasks import TasksManager  # a second to import, for an error alone

    for name in config.architectures or []:
        with suppress(ValueError, RuntimeError, AttributeError):
            return str(TasksManager.infer_task_from_model(getattr(transformers, name)))
    return None


class Dimensions(NamedTuple):
    """The size of a transformer."""

    layers: int
    heads: int
    width: int


def dimensions(config: Any) -> Dimensions:
    """Return the size of a model of any family, whatever its configuration calls layers, heads and width."""
    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:  # ours, and families that Optimum does not know
        normalized = NormalizedTextConfig(config)
    return Dimensions(normalized.num_layers, normalized.num_attention_heads, normalized.hidden_size)


def width_of(config: Any) -> int:
    """Return the width of a model's hidden states; 0 where it has no one width."""
    try:
        width = dimensions(config).width
    except AttributeError:
        return 0
    return width if isinstance(width, int) else 0


def task_name(folder: Path) -> str:
    """Return the task of a model folder's `task.json`; without one, text classification."""
    return read_config(folder).task if (folder / "task.json").is_file() else DEFAULT


def open_trained(folder: Path, task: Task | None = None) -> PreTrainedModel:
    """Open the model of a folder; `task` is that of its `task.json` when None."""
    if is_transcriber(AutoConfig.from_pretrained(folder)):
        return Transcriber.open(folder, task or load_task(folder))
    if task_class(task.name if task else task_name(folder)).embeds:
        return Embedder.open(folder)
    return auto_class(task.name if task else task_name(folder)).from_pretrained(folder)


def open_to_read(folder: Path, dtype: str, *, all_devices: bool) -> Any:
    """Open the model of a folder for inference, its weights in `dtype`, on this process's device or on all of them."""
    if dtype == "float32" and not all_devices:
        model: Any = open_trained(folder)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    if task_class(task_name(folder)).embeds and not all_devices and dtype != "int8":
        model = open_trained(folder).to(getattr(torch, dtype))
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"device_map": "auto" if all_devices else "cuda" if torch.cuda.is_available() else "cpu"}
    if dtype == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        options["dtype"] = getattr(torch, dtype)
    return auto_class(task_name(folder)).from_pretrained(folder, **options)
