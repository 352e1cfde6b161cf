"""What a PyTorch model computes for rows, in batches."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array


def logits_of(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Array:
    """A model's logits float32 [N, *answer_shape] in the rows' order, computed in batches of similar length."""
    encoded, batch_size = task.tokenize(rows), batch_size or task.at_once
    lengths = task.sizes(encoded)
    order = np.argsort(lengths, kind="stable")[::-1]  # the longest first: memory runs out at once or never
    logits = np.empty((len(rows), *task.answer_shape), dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = task.collate([encoded[i] for i in chosen])
            inputs = {n: torch.from_numpy(array).to(model.device) for n, array in task.graph_inputs(batch).items()}
            logits[chosen] = task.gather(model(**inputs).logits.float().cpu().numpy(), batch)
            if advance:
                advance(len(chosen))
    model.train(was_training)
    return logits
