"""Batched inference of PyTorch models."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kdexport.errors import ModelError, first_line
from kdexport.runtime.predictor import allowed_cores
from kdexport.tasks.base import Task
from kdexport.tasks.batches import in_batches
from kdexport.tasks.config import Arrays
from kdexport.tasks.inputs.media import Encoded
from kdexport.tasks.metrics import Array

# Of logits, relative to the largest: above this, a text's scores depend on its batch.
PADDING_TOLERANCE = 1e-3


def logits_of(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int | None = None,
    advance: Callable[[int], object] = lambda done: None,
    encoded: Sequence[Arrays] | None = None,
) -> Array:
    """A model's logits float32 [N, *answer_shape] in the rows' order, without dropout; `encoded`: see `tokenized`."""
    was_training = model.training
    model.eval()
    logits = run_model(model, task, rows, batch_size, advance, encoded)
    model.train(was_training)
    return logits


def padding_effect(model: PreTrainedModel, task: Task) -> float:
    """Return max |Δlogit| of texts beside longer ones from the same texts alone, relative to the largest logit.

    Raises:
        ModelError: the model's code can't read the texts.
    """
    empty, letter, long, *_ = task.probes()
    rows = [empty, letter, *task.examples()]
    try:
        logits_of(model, task, [long])  # all positions
        alone, together = (logits_of(model, task, rows, batch_size=size) for size in (1, len(rows)))
    except Exception as error:  # whatever a model's code raises
        what = f"the model ({model.config.model_type}) can't read texts of its tokenizer: {first_line(error)}"
        raise ModelError(what, "Check that the two belong together") from None
    return task.difference(together, alone) / max(1e-6, float(np.abs(alone).max()))


def run_model(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[dict[str, Any]],
    batch_size: int | None,
    advance: Callable[[int], object],
    encoded: Sequence[Arrays] | None = None,
) -> Array:
    """A model's logits, in training mode or not, as it is."""

    @torch.inference_mode()
    def run(arrays: Arrays) -> Array:
        inputs = {n: torch.from_numpy(array).to(model.device) for n, array in task.graph_inputs(arrays).items()}
        inputs = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        return task.gather(model(**inputs).logits.float().cpu().numpy(), arrays)

    return in_batches(task, rows, run, batch_size, advance, tokenized(task, rows) if encoded is None else encoded)


def tokenized(task: Task, rows: Sequence[dict[str, Any]]) -> Sequence[Arrays]:
    """Return encoded rows; images and recordings are decoded by as many threads as this process has cores."""
    encoded = task.tokenize(rows)
    if isinstance(encoded, Encoded):
        encoded.threads = max(1, allowed_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return encoded
