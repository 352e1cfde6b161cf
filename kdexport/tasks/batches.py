"""Run many rows through a model in batches of similar length."""

from collections.abc import Callable, Sequence

import numpy as np

from kdexport.tasks.base import Task
from kdexport.tasks.config import Arrays, Row
from kdexport.tasks.inputs.media import taken
from kdexport.tasks.metrics import Array


def in_batches(
    task: Task,
    rows: Sequence[Row],
    run: Callable[[Arrays], Array],
    batch_size: int | None = None,
    advance: Callable[[int], object] = lambda done: None,
    encoded: Sequence[Arrays] | None = None,
) -> Array:
    """Return the outputs of `run` on encoded batches, float32 [N, *answer_shape], in the rows' order.

    The longest rows come first, so that memory runs out at once or never. `advance` gets each batch's size.
    """
    encoded = task.tokenize(rows) if encoded is None else encoded
    batch_size = 1 if task.alone else batch_size or task.at_once
    order = np.argsort([-size for size in task.sizes(encoded)], kind="stable")
    outputs = np.empty((len(rows), *task.answer_shape), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size].tolist()
        outputs[chosen] = run(task.collate(taken(encoded, chosen)))
        advance(len(chosen))
    return outputs
