"""Answers that are several labels, or a number: what differs from one label of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from kdexport.tasks.base import Objective, Task
from kdexport.tasks.classes import Classes
from kdexport.tasks.config import Function, Items, Row
from kdexport.tasks.judging import metric
from kdexport.tasks.metrics import Array, Metric, f1_of

# A teacher whose F1 or correlation is lower knows nothing.
_CHANCE = 0.1
# Between the labels of a row, where rows are kept.
BETWEEN = "\x1f"


class SeveralLabels(Classes):
    """A row's `label` is all its labels, with `BETWEEN` between them; in a file a list, or a text with | between."""

    metric: ClassVar = Metric("micro F1")
    problem: ClassVar[str] = "multi-label"
    objective: ClassVar[Objective] = "several"
    function: ClassVar[Function] = "sigmoid"
    one_label: ClassVar[bool] = False

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        """A row with its labels joined, in order; or what is wrong with them."""
        labels = row["label"]
        if labels is None:
            return row
        every = labels if isinstance(labels, list) else str(labels).split("|")
        if not all(isinstance(label, str | int) and str(label).strip() for label in every) and every != [""]:
            return "its labels are no list of names"
        return row | {"label": BETWEEN.join(sorted({str(label).strip() for label in every} - {""}))}

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return set((row["label"] or "").split(BETWEEN)) - {""}

    def label_array(self, rows: Iterable[Row]) -> Array:
        """1 for a label that a row has, 0 for others: float32 [N, C]; NaN for a row of which it is not known."""
        index = {label: i for i, label in enumerate(self.labels)}
        rows = list(rows)
        found = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        for i, row in enumerate(rows):
            if row.get("label") is None:
                found[i] = np.nan
            else:
                found[i, [index[label] for label in self.labels_of(row)]] = 1.0
        return found

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Whether each row has all its labels and no other: bool [N]."""
        return np.asarray(((logits > 0) == (self.label_array(rows) > 0)).all(axis=1))

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Of each row, labels found rightly, labels found, and labels that there are: float64 [N, 3]."""
        ours, theirs = logits > 0, self.label_array(rows) > 0
        return np.stack([(ours & theirs).sum(1), ours.sum(1), theirs.sum(1)], axis=1).astype(np.float64)

    def value(self, sums: Array) -> Array:
        """F1 over all labels of all rows, of sums [..., 3] of counts."""
        return f1_of(sums)

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        return metric(self, logits, rows) < _CHANCE

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Macro F1: the mean over labels that the rows have."""
        ours, theirs = logits > 0, self.label_array(rows) > 0
        there = theirs.any(axis=0)
        f1 = 2 * (ours & theirs).sum(0) / np.maximum(ours.sum(0) + theirs.sum(0), 1)
        return {"macro F1": float(f1[there].mean())}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        """Each label that a row has."""
        of, labels = np.nonzero(self.label_array(rows) > 0)
        return Items(of, labels, logits[of])

    def chosen(self, items: Items) -> Array:
        """The label of each item where it is found, else −1: int64 [M]."""
        return np.where(items.logits[np.arange(len(items.labels)), items.labels] > 0, items.labels, -1)


class Number(Classes):
    """A row's `label` is a number, and so is the answer: the one logit."""

    metric: ClassVar = Metric("Pearson correlation")
    problem: ClassVar[str] = "regression"
    objective: ClassVar[Objective] = "number"
    function: ClassVar[Function] = "none"
    one_label: ClassVar[bool] = False
    has_names: ClassVar[bool] = False

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        """A row whose label is written as a number; or what is wrong with it."""
        try:
            number = None if row["label"] is None else float(row["label"])
        except (TypeError, ValueError):
            return f"label {row['label']!r} is no number"
        if number is not None and not math.isfinite(number):
            return f"label {row['label']!r} is not finite"
        return row | {"label": None if number is None else f"{number:g}"}

    labels_of = staticmethod(Task.labels_of)  # numbers have no names, strata or labels to look at
    stratum = staticmethod(Task.stratum)
    items = Task.items

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """What the one logit is called."""
        return ["value"]

    def label_array(self, rows: Iterable[Row]) -> Array:
        """The rows' numbers float32 [N, 1]; NaN for a row without one."""
        values = [row.get("label") for row in rows]
        return np.array([[np.nan if value is None else float(value)] for value in values], dtype=np.float32)

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        return _products(logits[:, 0], self.label_array(rows)[:, 0])

    def value(self, sums: Array) -> Array:
        """Pearson's correlation, of sums [..., 6] of counts; 0 where one side does not vary."""
        n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums), -1, 0)
        spread = np.maximum((n * xx - x * x) * (n * yy - y * y), 0.0)
        return np.asarray(np.where(spread > 0, (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-300)), 0.0))

    def correct(self, logits: Array, rows: Sequence[Row]) -> None:  # type: ignore[override]
        """None: a number is not right or wrong."""

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        return metric(self, logits, rows) < _CHANCE

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Spearman's correlation: Pearson's of the ranks."""
        x, y = (_ranks(side[:, 0]) for side in (logits, self.label_array(rows)))
        return {"Spearman correlation": float(self.value(_products(x, y).sum(axis=0)))}


def _products(x: Array, y: Array) -> Array:
    """Return 1, x, y, x², y² and xy of each row, float64 [N, 6]; centred, which costs sums fewer digits."""
    x, y = (side.astype(np.float64) - side.mean(dtype=np.float64) for side in (x, y))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])
