"""Which of Transformers' Auto classes a task's models are opened with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import kdexport.models.convnet
import kdexport.models.textnet  # noqa: F401  # the Auto classes learn of our own architectures
from kdexport.tasks.config import read_config

# task → the class that opens its models, and what such models' architectures are called
AUTO_CLASSES: dict[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "image-classification": AutoModelForImageClassification,
    "audio-classification": AutoModelForAudioClassification,
}
_HEADS = {
    "text-classification": ("ForSequenceClassification",),
    "token-classification": ("ForTokenClassification",),
    "causal-lm": ("LMHeadModel", "ForCausalLM"),
    "image-classification": ("ForImageClassification",),
    "audio-classification": ("ForAudioClassification", "ForSequenceClassification"),  # Wav2Vec2's has the latter name
}


def has_head(config: Any, task: str) -> bool:
    """Whether a model of this configuration was trained for the task, by its architecture."""
    named = any(head in name for name in config.architectures or [] for head in _HEADS[task])
    return named and type(config) in AUTO_CLASSES[task]._model_mapping


def task_of(config: Any) -> str | None:
    """The task that a Hugging Face model was trained for; None where it has no head of ours."""
    return next((task for task in _HEADS if has_head(config, task)), None)


def task_name(folder: Path) -> str:
    """What a model's folder is for, as its `task.json` says; without one, text classification."""
    return read_config(folder).task if (folder / "task.json").is_file() else "text-classification"


def open_trained(folder: Path) -> PreTrainedModel:
    """The model of a folder of ours."""
    return AUTO_CLASSES[task_name(folder)].from_pretrained(folder)
