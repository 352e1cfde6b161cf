"""Many rows through a model: the one loop that sorts rows by length, collates them, and puts outputs in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdexport.tasks.base import Task
from kdexport.tasks.config import Arrays, Row
from kdexport.tasks.metrics import Array


def in_batches(
    task: Task,
    rows: Sequence[Row],
    run: Callable[[Arrays], Array],
    batch_size: int | None = None,
    advance: Callable[[int], object] = lambda done: None,
) -> Array:
    """Outputs float32 [N, *answer_shape] of `run`, which takes an encoded batch, in the rows' order.

    Batches hold rows of similar length. The longest come first: memory runs out at once or never.
    """
    encoded, batch_size = task.tokenize(rows), batch_size or task.at_once
    order = np.argsort([-size for size in task.sizes(encoded)], kind="stable")
    outputs = np.empty((len(rows), *task.answer_shape), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        outputs[chosen] = run(task.collate([encoded[i] for i in chosen]))
        advance(len(chosen))
    return outputs
