"""One file a task: raw row → arrays, names and axes of the graph, logits → answer, metric.

Training, calibration, verification, benchmark, prediction and serving all call the same `encode` and
`decode`, so nothing can differ between training and serving. No task knows torch or transformers.
"""

from __future__ import annotations

from pathlib import Path

from kdexport.errors import ArtifactError
from kdexport.tasks.audio_classification import AudioClassification
from kdexport.tasks.config import read_config
from kdexport.tasks.image_classification import ImageClassification
from kdexport.tasks.text_classification import TextClassification
from kdexport.tasks.token_classification import TokenClassification

Task = TextClassification | TokenClassification | ImageClassification | AudioClassification

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TextClassification, TokenClassification, ImageClassification, AudioClassification)
}


def load_task(folder: Path) -> Task:
    """Open the task that a model folder or an artifact was made for.

    Raises:
        ArtifactError: the folder holds no task, or its tokenizer is missing or unreadable.
    """
    name = read_config(folder).task
    if name not in TASKS:
        raise ArtifactError(f"{folder} is for the task {name!r}, which is none of {', '.join(TASKS)}")
    return TASKS[name].load(folder)
