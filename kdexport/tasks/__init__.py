"""One file a task: raw row → arrays, names and axes of the graph, logits → answer, metric.

Training, calibration, verification, benchmark, prediction and serving all call the same `encode` and
`decode`, so nothing can differ between training and serving. No task knows torch or transformers.
"""

from __future__ import annotations

from pathlib import Path

from kdexport.tasks.text_classification import TextClassification

TASKS = {TextClassification.name: TextClassification}

Task = TextClassification


def load_task(folder: Path) -> Task:
    """Open the task that a model folder or an artifact was made for.

    Raises:
        ArtifactError: the folder holds no task, or its tokenizer is missing or unreadable.
    """
    return TextClassification.load(folder)
