"""Tasks, a file each: encoding, decoding, metrics, and the settings that a spec may choose.

Training, calibration, verification, benchmarks, prediction and serving share one `encode` and one `decode`. `base.Task`
defines the interface. Another package registers a task by an entry point in the group `kdexport.tasks`:
`numbers = "package.module:Numbers"`.
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
# Names only, imported on demand: `kdexport --help` must stay fast.
BUILT_IN = {
    "text-classification": "kdexport.tasks.text_classification:TextClassification",
    "text-ranking": "kdexport.tasks.text_ranking:TextRanking",
    "token-classification": "kdexport.tasks.token_classification:TokenClassification",
    "causal-lm": "kdexport.tasks.causal_lm:CausalLM",
    "image-classification": "kdexport.tasks.image_classification:ImageClassification",
    "audio-classification": "kdexport.tasks.audio_classification:AudioClassification",
    "sentence-embedding": "kdexport.tasks.sentence_embedding:SentenceEmbedding",
    "automatic-speech-recognition": "kdexport.tasks.speech_recognition:SpeechRecognition",
}


def names() -> list[str]:
    """Return the names of all tasks, built-in ones first."""
    return [*BUILT_IN, *_others()]


def kinds() -> list[type[Task]]:
    """Return every task, once for each `data.problem`; the default comes last."""
    others = (name for name in names() if name != DEFAULT)
    return [kind for name in (*others, DEFAULT) for kind in task_class(name).kinds().values()]


@cache
def task_class(name: str, problem: str = "single-label") -> type[Task]:
    """Return the class of a task for a `data.problem`; raise KeyError if there is none."""
    found: Any = resolve_name(BUILT_IN[name]) if name in BUILT_IN else _others()[name].load()
    return found.kinds()[problem]  # type: ignore[no-any-return]


def class_of(config: TaskConfig) -> type[Task]:
    """Return the task class of a model's configuration."""
    return task_class(config.task).of(config)


def load_task(folder: Path) -> Task:
    """Load the task of a model folder or an artifact; raise ArtifactError if it can't be used."""
    from kdexport.tasks.config import read_config

    config = read_config(folder)
    if config.task not in names():
        raise ArtifactError(f"{folder} has the unknown task {config.task!r}; known are {', '.join(names())}")
    found = class_of(config)
    if wrong := _contradiction(config, found):
        raise ArtifactError(f"{folder}: the task {config.task} {wrong}", "Pack the artifact again")
    return found.load(folder)


def _contradiction(config: TaskConfig, kind: type[Task]) -> str:
    """Return the inconsistency in a task's configuration, or an empty text."""
    inputs, modality = set(config.inputs), kind.modality
    if not config.labels and kind.has_labels:
        return "has no labels"
    if modality == "text":
        if "input_ids" not in inputs or inputs - {"input_ids", "attention_mask", "token_type_ids"}:
            return f"has inputs that no text task has: {config.inputs}"
        return "" if config.max_length else "has max_length 0"
    if config.decoder and (kind.problem != "seq2seq" or config.end_id is None or not config.max_length):
        return "has a decoder that does not fit it"
    if getattr(config, modality, None) is None:
        return f"lacks the settings for {modality} input"
    if len(inputs) != 1:
        return f"must have one input, not {config.inputs}"
    return "has too large an input" if config.audio and config.audio.length * max(1, config.audio.mels) > 2**25 else ""


@cache
def _others() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="kdexport.tasks") if entry.name not in BUILT_IN}
