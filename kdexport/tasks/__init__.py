"""One file a task: raw row → arrays, names and axes of the graph, logits → answer, metric.

Training, calibration, verification, benchmark, prediction and serving all call the same `encode` and
`decode`, so nothing can differ between training and serving. No task knows torch or transformers.
"""

from __future__ import annotations

from pathlib import Path

from kdexport.errors import ArtifactError
from kdexport.tasks.audio_classification import AudioClassification
from kdexport.tasks.causal_lm import CausalLM
from kdexport.tasks.config import Function, TaskConfig, read_config
from kdexport.tasks.image_classification import ImageClassification
from kdexport.tasks.text_classification import MultiLabelTexts, TextClassification, TextRegression
from kdexport.tasks.token_classification import TokenClassification

Task = TextClassification | TokenClassification | CausalLM | ImageClassification | AudioClassification

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (TextClassification, TokenClassification, CausalLM, ImageClassification, AudioClassification)
}


# problem, as `data.problem` names it → the function from logits to scores, and the class for texts
PROBLEMS: dict[str, tuple[Function, type[TextClassification]]] = {
    "single-label": ("softmax", TextClassification),
    "multi-label": ("sigmoid", MultiLabelTexts),
    "regression": ("none", TextRegression),
}


def task_class(name: str, problem: str = "single-label") -> type[Task]:
    """The class of a task's kind of answers."""
    return PROBLEMS[problem][1] if name == TextClassification.name else TASKS[name]


def problem_of(config: TaskConfig) -> str:
    """The problem, as `data.problem` names it, whose function from logits to scores a task has."""
    return next(problem for problem, (function, _) in PROBLEMS.items() if function == config.function)


def load_task(folder: Path) -> Task:
    """Open the task that a model folder or an artifact was made for.

    Raises:
        ArtifactError: the folder holds no task, or one that contradicts itself, or its tokenizer is missing or
            unreadable.
    """
    config = read_config(folder)
    name = config.task
    if name not in TASKS:
        raise ArtifactError(f"{folder} is for the task {name!r}, which is none of {', '.join(TASKS)}")
    if wrong := _contradiction(config):
        raise ArtifactError(f"{folder}: the task {name} {wrong}", "Pack the artifact again")
    return task_class(name, problem_of(config)).load(folder)


def _contradiction(config: TaskConfig) -> str:
    """Return what a task's settings lack, which types can't say."""
    reads, inputs = TASKS[config.task].modality, set(config.inputs)
    if not config.labels and config.task != CausalLM.name:
        return "has no labels"
    if reads == "text":
        if "input_ids" not in inputs or inputs - {"input_ids", "attention_mask", "token_type_ids"}:
            return f"can't be read from the inputs {config.inputs}"
        return "" if config.max_length else "reads no token: max_length is 0"
    how = getattr(config, reads)
    if how is None:
        return f"says nothing of how {reads} is read"
    if len(inputs) != 1:
        return f"has one input, not {config.inputs}"
    return "reads too much" if config.audio and config.audio.length * max(1, config.audio.mels) > 2**25 else ""
