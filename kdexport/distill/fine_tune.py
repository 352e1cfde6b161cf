"""Fine-tune a teacher on the labelled rows."""

from collections.abc import Collection
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel

from kdexport import ranks, spec
from kdexport.analysis import sampled
from kdexport.data import read_rows
from kdexport.data.rows import Rows
from kdexport.distill.train import TrainConfig, fit
from kdexport.errors import ModelError, counted
from kdexport.files import write_json
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.registry import width_of
from kdexport.progress import say
from kdexport.spec import derive
from kdexport.tasks.base import Task
from kdexport.tasks.inputs.ragged import MANY
from kdexport.tasks.metrics import Array

_RECORD = "training.json"
_FEW_ROWS = 8  # a label


def fine_tune(
    opened: ModelAndProcessor,
    task: Task,
    given: spec.TeacherTraining,
    data: Path,
    seed: int,
    out: Path,
    *,
    trained: bool,
) -> None:
    """Train a teacher in place on a data stage's labels, and write `training.json`; `trained`: it has weights already.

    Raises:
        ModelError: a split has no labels, or training diverged.
    """
    model, (train, validation) = opened.model, (_labelled(data, split) for split in ("train", "validation"))
    rows, width = (len(train), len(validation), len(task.labels)), width_of(model.config)
    how = derive.training(given, *rows, width, trained=trained, menu=task.menu)
    batch = derive.dealt(how.batch_size, ranks.size(), given.accumulate, "teacher.train.batch_size")
    how = how._replace(batch_size=batch)
    for name, derived in how._asdict().items():
        if derived and derived.reason != "as given":
            say(f"teacher: {name.replace('_', ' ')} {derived.value:g}: {derived.reason}")
    recipe = TrainConfig(
        epochs=int(how.epochs.value),
        learning_rate=how.learning_rate.value,
        batch_size=int(how.batch_size.value),
        patience=int(how.patience.value) if how.patience else None,
        dtype=given.dtype,
        accumulate=given.accumulate,
        checkpoint_gradients=given.checkpoint_gradients,
        compile=given.compile,
        seed=seed,
    )
    some = train.take(sampled(len(train), MANY))
    _start_at_base_rates(model, opened.fresh, task, task.label_array(some))
    say(f"teacher: fine-tuning on {counted(len(train), 'row')}, {counted(recipe.epochs, 'epoch')}")
    title = "fine-tune teacher"
    curve = fit(model, task, train, None, recipe, validation=validation, work=out, title=title, fresh=opened.fresh)
    write_json(out / _RECORD, {"recipe": recipe, "curve": curve, "rows": len(train), "labels": len(task.labels)})


def cause_of_chance(teacher: Path) -> str | None:
    """Return the likely cause why a teacher that was fine-tuned here is near chance, and what to do; else None."""
    if not (teacher / _RECORD).is_file():
        return None
    record = msgspec.json.decode((teacher / _RECORD).read_bytes())
    curve, rows, labels = record["curve"], record["rows"], record["labels"]
    first, last = curve[0]["loss"], curve[-1]["loss"]
    if rows < _FEW_ROWS * labels:
        return (
            f"Most likely {rows:,} rows are too few for {labels} labels: add some, or name a teacher trained for them"
        )
    if last < first / 2:
        learned = f"it learned the training rows (loss {first:.3g} → {last:.3g}), and they say nothing about others"
        return f"Most likely the labels are at fault: {learned}. Is --label the right column?"
    slow = f"its loss hardly fell in {counted(len(curve), 'epoch')} ({first:.3g} → {last:.3g})"
    return f"Most likely it was trained too little: {slow}. Raise teacher.train.epochs or teacher.train.learning_rate"


def _labelled(data: Path, split: str) -> Rows:
    rows = read_rows(data, split).where(lambda row: row["label"] is not None)
    if not rows:
        raise ModelError(
            f"the {split} rows have no labels to fine-tune the teacher on",
            "Add some, or take a teacher that is trained",
        )
    return rows


@torch.no_grad()
def _start_at_base_rates(model: PreTrainedModel, fresh: Collection[str], task: Task, labels: Array) -> None:
    """Set the bias of a new head so that its first answers are the labels' frequencies, or their mean.

    Rare labels are not unlearned first then (Lin et al. 2017, section 4.1).
    """
    if task.objective in ("next-token", "ctc", "ranking"):
        return
    if task.objective == "number":
        rates = labels.mean(axis=0)
    elif task.objective == "several":
        p = (labels.sum(axis=0) + 1) / (len(labels) + 2)
        rates = np.log(p / (1 - p))
    else:
        counts = np.bincount(labels[labels >= 0].ravel(), minlength=len(task.labels)) + 1
        rates = np.log(counts / counts.sum())
    for name, weights in model.named_parameters():
        if name in fresh and name.endswith("bias") and weights.shape == rates.shape:
            weights.copy_(torch.from_numpy(rates))
