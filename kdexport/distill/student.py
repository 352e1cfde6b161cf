"""The student: its shape, its first weights from the teacher's, and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed

from kdexport import spec
from kdexport.data import read_rows
from kdexport.distill import recipe
from kdexport.distill.teacher import Opened, open_config, open_model, read_task_config, save_model, save_task
from kdexport.distill.train import Recipe, fit, logits_of
from kdexport.errors import ModelError
from kdexport.progress import say
from kdexport.rundir import write_json
from kdexport.tasks import load_task


def train_student(
    student: spec.Student,
    distill: spec.Distill,
    *,
    data: Path,
    teacher: Path,
    targets: Path | None,
    seed: int,
    out: Path,
) -> None:
    """Build and train a student; write it as a Hugging Face folder.

    Args:
        student, distill: the spec's parts.
        data, teacher: finished stages.
        targets: the finished soft targets, or None for the baseline: the same student on labels alone.
        seed: of weights and order of rows; the same for student and baseline.
        out: gets the model, `task.json`, `training.json` and `reference.npy`, the trained student's logits in
            PyTorch for the test rows and the task's probes (float32 [N, C]), for verification to compare with.
    """
    set_seed(seed)
    name = "student" if targets else "baseline"
    opened, origin = build_student(student.model, teacher)
    teacher_task = read_task_config(teacher)
    save_task(opened, teacher_task.max_length, teacher_task.labels, out)
    task = load_task(out)
    rows, validation = read_rows(data, "train"), read_rows(data, "validation")
    config = opened.model.config
    pretrained = student.model not in recipe.PRESETS
    how = Recipe(
        epochs=int(recipe.epochs(distill, len(rows)).value),
        learning_rate=recipe.learning_rate(distill, config.hidden_size, pretrained).value,
        batch_size=distill.batch_size,
        seed=seed,
        temperature=distill.temperature if targets else 1.0,
        alpha=distill.alpha if targets else 0.0,
    )
    parameters = opened.model.num_parameters()
    say(
        f"{name}: {config.num_hidden_layers} layers × {config.hidden_size}, {parameters / 1e6:.1f} M parameters, "
        f"{origin}; {how.epochs} epochs, learning rate {how.learning_rate:g}"
    )
    soft = np.load(targets / "train.npy") if targets else None
    curve = fit(opened.model, task, rows, soft, how, validation=validation, work=out, title=f"train {name}")
    write_json(out / "training.json", {"recipe": how, "curve": curve, "origin": origin, "parameters": parameters})
    np.save(out / "reference.npy", logits_of(opened.model, task, [*read_rows(data, "test"), *task.probes()]))
    save_model(opened, out)


def build_student(model: str, teacher_folder: Path) -> tuple[Opened, str]:
    """A student with its first weights, and in words where they come from.

    Raises:
        ModelError: the teacher has too few layers, or the named model can't be opened.
    """
    keep = recipe.layers_to_keep(model)
    if model not in recipe.PRESETS and keep is None:
        labels = read_task_config(teacher_folder).labels
        return open_model(model, open_config(model), labels), f"its weights from {model}"
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    if keep is not None:
        return Opened(_lowest_layers(teacher, keep), tokenizer), f"the teacher's lowest {keep} layers"
    layers, width = recipe.PRESETS[model]
    student = _narrow(teacher, layers, width)
    kept = _start_embeddings_from(teacher, student)
    return Opened(student, tokenizer), f"embeddings from the teacher's by PCA ({kept:.0%} of their variance)"


def _lowest_layers(teacher: PreTrainedModel, keep: int) -> PreTrainedModel:
    """The teacher's embeddings, lowest layers and head; the names of what is kept are the same in both."""
    if keep > teacher.config.num_hidden_layers:
        raise ModelError(f"the teacher has {teacher.config.num_hidden_layers} layers, not {keep}", "Ask for fewer")
    config = _copy_config(teacher, num_hidden_layers=keep)
    student = AutoModelForSequenceClassification.from_config(config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def _narrow(teacher: PreTrainedModel, layers: int, width: int) -> PreTrainedModel:
    """A new model of the teacher's family. No dropout: so small a student underfits, and soft targets hold it."""
    feed_forward = "intermediate_size" if hasattr(teacher.config, "intermediate_size") else "hidden_dim"
    config = _copy_config(
        teacher,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        **{feed_forward: 4 * width},
    )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if getattr(config, "embedding_size", None) is not None:  # ELECTRA and ALBERT factorise theirs
        config.embedding_size = width
    return AutoModelForSequenceClassification.from_config(config)


def _copy_config(teacher: PreTrainedModel, **changes: Any) -> Any:
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@torch.no_grad()
def _start_embeddings_from(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """Project the teacher's embeddings onto the principal axes of its word table.

    Word, position and type embeddings are summed before the first layer, so one projection serves all three,
    and the sum's projection is the projections' sum.

    Returns:
        The share of the word table's variance that is kept.
    """
    words = teacher.get_input_embeddings().weight
    mean = words.mean(dim=0)
    variances, axes = torch.linalg.eigh(torch.cov((words - mean).T.double()))
    width = student.get_input_embeddings().weight.shape[1]
    if width > words.shape[1]:
        raise ModelError(
            f"the student is {width} wide, the teacher's embeddings {words.shape[1]}", "Take a smaller one"
        )
    projection = axes[:, -width:].flip(1).to(words.dtype)
    ours, theirs = _embedding_tables(student), _embedding_tables(teacher)
    for name, table in theirs.items():
        source = table - mean if table.data_ptr() == words.data_ptr() else table
        ours[name].copy_(source @ projection)
    return float(variances[-width:].sum() / variances.sum())


def _embedding_tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tables that are summed into the first layer's input, by name."""
    block = model.base_model.embeddings
    return {name: part.weight for name, part in block.named_modules() if isinstance(part, torch.nn.Embedding)}
