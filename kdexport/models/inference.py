"""Batched inference of PyTorch models."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kdexport.tasks.base import Task
from kdexport.tasks.batches import in_batches
from kdexport.tasks.config import Arrays
from kdexport.tasks.metrics import Array


def logits_of(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int | None = None,
    advance: Callable[[int], object] = lambda done: None,
) -> Array:
    """A model's logits float32 [N, *answer_shape] in the rows' order, without dropout."""
    was_training = model.training
    model.eval()
    logits = run_model(model, task, rows, batch_size, advance)
    model.train(was_training)
    return logits


def run_model(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[dict[str, Any]],
    batch_size: int | None,
    advance: Callable[[int], object],
) -> Array:
    """A model's logits, in training mode or not, as it is."""

    @torch.inference_mode()
    def run(arrays: Arrays) -> Array:
        inputs = {n: torch.from_numpy(array).to(model.device) for n, array in task.graph_inputs(arrays).items()}
        return task.gather(model(**inputs).logits.float().cpu().numpy(), arrays)

    return in_batches(task, rows, run, batch_size, advance)
