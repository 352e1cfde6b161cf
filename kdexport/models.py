"""Which of Transformers' Auto classes a task's models are opened with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

import kdexport.networks  # noqa: F401  # the Auto classes learn of our own architectures
from kdexport.tasks.config import read_config

# task → the class that opens its models, and what such models' architectures are called
AUTO_CLASSES: dict[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}
HEADS = {"text-classification": "ForSequenceClassification", "token-classification": "ForTokenClassification"}


def task_of(config: Any) -> str | None:
    """The task that a Hugging Face model was trained for, by its architecture; None where it has no head of ours."""
    names = config.architectures or []
    return next((task for task, head in HEADS.items() if any(head in name for name in names)), None)


def open_trained(folder: Path) -> PreTrainedModel:
    """The model of a folder of ours, which says in `task.json` what it is for."""
    return AUTO_CLASSES[read_config(folder).task].from_pretrained(folder)
