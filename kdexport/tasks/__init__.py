"""Tasks, a file each: rows → arrays, outputs → answers, metric, and what a spec may ask for.

Training, calibration, verification, benchmarks, prediction and serving all call the same `encode` and `decode`, so
nothing can differ between training and serving. `base.Task` says what a task holds. Another package adds one by an
entry point of the group `kdexport.tasks`: `numbers = "package.module:Numbers"`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from kdexport.errors import ArtifactError

if TYPE_CHECKING:
    from kdexport.tasks.base import Task
    from kdexport.tasks.config import TaskConfig

DEFAULT = "text-classification"
# Named and not imported: `kdexport --help` wants the names alone.
BUILT_IN = {
    "text-classification": "kdexport.tasks.text_classification:TextClassification",
    "token-classification": "kdexport.tasks.token_classification:TokenClassification",
    "causal-lm": "kdexport.tasks.causal_lm:CausalLM",
    "image-classification": "kdexport.tasks.image_classification:ImageClassification",
    "audio-classification": "kdexport.tasks.audio_classification:AudioClassification",
}


def names() -> list[str]:
    """Return the names of all tasks, ours first."""
    return [*BUILT_IN, *_others()]


@cache
def task_class(name: str, problem: str = "single-label") -> type[Task]:
    """Return the class of a task, for the kind of answer that `data.problem` names.

    Raises:
        KeyError: there is no such task, or it has no such answers.
    """
    found: Any = resolve_name(BUILT_IN[name]) if name in BUILT_IN else _others()[name].load()
    return found.kinds()[problem]  # type: ignore[no-any-return]


def class_of(config: TaskConfig) -> type[Task]:
    """Return the class of a model's task, for its kind of answer."""
    kinds = task_class(config.task).kinds().values()
    return next((kind for kind in kinds if kind.function == config.function), task_class(config.task))


def load_task(folder: Path) -> Task:
    """Open the task that a model folder or an artifact was made for.

    Raises:
        ArtifactError: the folder holds no task, or one that contradicts itself, or its tokenizer is missing or
            unreadable.
    """
    from kdexport.tasks.config import read_config

    config = read_config(folder)
    if config.task not in names():
        raise ArtifactError(f"{folder} is for the task {config.task!r}, which is none of {', '.join(names())}")
    found = class_of(config)
    if wrong := _contradiction(config, found):
        raise ArtifactError(f"{folder}: the task {config.task} {wrong}", "Pack the artifact again")
    return found.load(folder)


def _contradiction(config: TaskConfig, kind: type[Task]) -> str:
    """Return what a task's settings lack, which types can't say."""
    inputs, modality = set(config.inputs), kind.modality
    if not config.labels and kind.has_labels:
        return "has no labels"
    if modality == "text":
        if "input_ids" not in inputs or inputs - {"input_ids", "attention_mask", "token_type_ids"}:
            return f"can't be read from the inputs {config.inputs}"
        return "" if config.max_length else "reads no token: max_length is 0"
    how = getattr(config, modality, None)
    if how is None:
        return f"says nothing of how {modality} is read"
    if len(inputs) != 1:
        return f"has one input, not {config.inputs}"
    return "reads too much" if config.audio and config.audio.length * max(1, config.audio.mels) > 2**25 else ""


@cache
def _others() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="kdexport.tasks") if entry.name not in BUILT_IN}
