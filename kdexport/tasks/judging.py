"""A task's metric with its uncertainty, and comparisons of two models on the same rows.

A task provides each row's sufficient statistics, `stats` [N, K], and the metric for their sums, `value`. So any metric
can be bootstrapped over rows (Efron 1979, with Poisson weights as in Chamandy et al. 2012). Where the metric is the
fraction of correct rows, closed forms are used, which hold for few rows as well.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from kdexport.tasks.base import Task
from kdexport.tasks.config import Row
from kdexport.tasks.metrics import (
    Array,
    Metric,
    cohen_kappa,
    confusion_matrix,
    mcnemar_p,
    paired_difference,
    wilson_interval,
)

Rows = Sequence[Row]
Interval = tuple[float, float]

_DRAWS, _BLOCK = 2000, 100
CHANCE_KAPPA = 0.1
# What models are judged by where rows have no labels.
AGREEMENT = Metric("agreement with the teacher")


class ByTeacher:
    """A task whose metric on some rows without labels is the agreement with the teacher's logits for them."""

    metric = AGREEMENT

    def __init__(self, task: Task, teacher: Array) -> None:
        self._task, self._teacher = task, teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def stats(self, logits: Array, rows: Rows) -> Array:
        """(agreement, 1): float64 [N, 2]."""
        same = np.asarray(self._task.agrees(logits, self._teacher), np.float64)
        return np.stack([same, np.ones_like(same)], axis=1)

    def value(self, sums: Array) -> Array:
        """The mean agreement."""
        return np.asarray(sums[..., 0] / sums[..., 1])

    def further(self, logits: Array, rows: Rows) -> dict[str, float]:
        """Nothing: secondary metrics are of labels."""
        return {}


def judged(task: Task, rows: Rows, teacher: Array) -> Task:
    """Return the task, or where no row has a label one that is judged by its teacher's logits for these rows."""
    return task if any(row["label"] is not None for row in rows) else cast(Task, ByTeacher(task, teacher))


def metric(task: Task, logits: Array, rows: Rows) -> float:
    """Return the task's metric on labelled rows."""
    return float(task.value(task.stats(logits, rows).sum(axis=0)))


def near_chance(task: Task, logits: Array, rows: Rows) -> bool:
    """Return whether a teacher's answers to labelled rows are hardly better than guesses."""
    if task.config.function != "softmax":
        return task.is_chance(logits, rows)
    items = task.items(rows, logits)
    if len(np.unique(items.labels)) < 2:  # kappa is 0 then, also of answers that are all right
        return False
    return cohen_kappa(confusion_matrix(items.labels, items.logits.argmax(axis=1), len(task.labels))) < CHANCE_KAPPA


def metric_interval(task: Task, logits: Array, rows: Rows) -> tuple[float, Interval]:
    """Return the metric, and its 95 % interval over rows."""
    counts = task.stats(logits, rows)
    value = float(task.value(counts.sum(axis=0)))
    if task.metric.kind == "fraction":
        return value, wilson_interval(int(counts[:, 0].sum()), len(rows))
    return value, _interval(task.value(sums) for (sums,) in _drawn(counts))


def difference(task: Task, first: Array, second: Array, rows: Rows) -> tuple[float, Interval]:
    """Return the metric of the second logits minus that of the first on the same rows, with its 95 % interval."""
    return difference_of_stats(task, task.stats(first, rows), task.stats(second, rows))


def difference_of_stats(task: Task, a: Array, b: Array) -> tuple[float, Interval]:
    """Return the metric for statistics b [N, K] minus that for a, of the same rows, with its 95 % interval."""
    if task.metric.kind == "fraction":
        return paired_difference(a[:, 0] > 0, b[:, 0] > 0)
    value = float(task.value(b.sum(axis=0)) - task.value(a.sum(axis=0)))
    return value, _interval(task.value(of_b) - task.value(of_a) for of_a, of_b in _drawn(a, b))


def mcnemar(task: Task, first: Array, second: Array, rows: Rows) -> float | None:
    """Return the p-value of McNemar's exact test on correct rows; None where rows are not right or wrong."""
    a, b = task.correct(first, rows), task.correct(second, rows)
    return None if a is None or b is None else mcnemar_p(a, b)


def wrong_rows(task: Task, logits: Array, rows: Rows) -> list[int] | None:
    """Return the indices of incorrect rows; None where rows are not right or wrong."""
    right = task.correct(logits, rows)
    return None if right is None else np.flatnonzero(~right).tolist()


def _drawn(*counts: Array) -> Iterator[list[Array]]:
    """Yield bootstrapped sums [B, K], with the same resampled rows for each of the counts."""
    draw = np.random.default_rng(0)
    for _ in range(_DRAWS // _BLOCK):
        weights = draw.poisson(1.0, (_BLOCK, len(counts[0]))).astype(np.float64)
        yield [weights @ each for each in counts]


def _interval(values: Iterator[Array]) -> Interval:
    low, high = np.nanquantile(np.concatenate(list(values)), (0.025, 0.975))
    return float(low), float(high)
