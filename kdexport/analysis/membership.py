"""Membership inference by a threshold on confidence."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdexport.results import Attack, Membership
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array, best_threshold, roc_auc

Rows = Sequence[dict[str, Any]]


def membership(
    task: Task, train_rows: Rows, train_logits: Array, test_rows: Rows, test_logits: Array
) -> Membership | None:
    """Attack a model by its confidence: is it higher on training rows than on others?

    A row is taken for a member where the highest score (Salem et al. 2019, adversary 3) or the score of the row's label
    (Yeom et al. 2018, whose membership advantage is TPR − FPR) is above a threshold. Where train and test differ in
    kind, that shows as well, so a high figure is a reason to look, not a proof.

    Test rows whose contents are in train, too, are skipped; a row without a label counts for the confidence only.

    Returns:
        None where a side has no rows, or the logits are no scores.

    Raises:
        ValueError: there is not one row of logits for each row.
    """
    if (len(train_rows), len(test_rows)) != (len(train_logits), len(test_logits)):
        raise ValueError(f"logits [{len(train_logits)}] and [{len(test_logits)}] are not of these rows")
    trained_on = {task.content(row) for row in train_rows}
    unseen = [i for i, row in enumerate(test_rows) if task.content(row) not in trained_on]
    if task.config.function == "none" or not trained_on or not unseen:
        return None
    others, other_logits = [test_rows[i] for i in unseen], test_logits[unseen]
    labelled = [_scores_of_labels(task, *side) for side in ((train_rows, train_logits), (others, other_logits))]
    return Membership(
        by_confidence=_attack(task.confidence(train_logits, train_rows), task.confidence(other_logits, others)),
        by_label=_attack(*labelled) if all(map(len, labelled)) else None,
    )


def _scores_of_labels(task: Task, rows: Rows, logits: Array) -> Array:
    """Return the score of each labelled item's label (a row, or a word of one)."""
    items = task.items(rows, logits)
    return np.asarray(task.scores(items.logits)[np.arange(len(items.labels)), items.labels])


def _attack(members: Array, others: Array) -> Attack:
    area, interval = roc_auc(members, others)
    return Attack(area, interval, *best_threshold(members, others), len(members), len(others))
