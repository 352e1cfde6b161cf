"""What tests of tags share."""

import numpy as np


def logits_of(task, rows):
    """Logits whose best are the tags of these rows, each a text of tags."""
    logits = np.zeros((len(rows), *task.answer_shape), dtype=np.float32)
    for i, row in enumerate(rows):
        for j, tag in enumerate(row.split()):
            logits[i, j, task.labels.index(tag)] = 5.0
    return logits
