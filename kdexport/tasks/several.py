"""Multi-label classification and regression, as differences from single-label classification."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from kdexport.tasks.base import Objective, Task
from kdexport.tasks.classes import Classes
from kdexport.tasks.config import Function, Items, Row
from kdexport.tasks.metrics import Array, Metric, f1_of, mid_ranks, pearson, products

# The separator of a row's labels.
BETWEEN = "\x1f"


class SeveralLabels(Classes):
    """A row's `label` is all its labels, joined by `BETWEEN`; in a file a list, or a text separated by |."""

    metric: ClassVar = Metric("micro F1")
    problem: ClassVar[str] = "multi-label"
    objective: ClassVar[Objective] = "several"
    function: ClassVar[Function] = "sigmoid"
    one_label: ClassVar[bool] = False

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        labels = [row["label"] for row in rows]
        if any(isinstance(label, list) for label in labels):
            return "the labels are lists"
        return "some labels have | between names" if any("|" in str(label) for label in labels) else ""

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
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
        """float32 [N, C]: 1 for a row's labels, 0 for others; NaN for an unlabelled row."""
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
        """bool [N]: a row has exactly its labels."""
        return np.asarray(((logits > 0) == (self.label_array(rows) > 0)).all(axis=1))

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """True positives, predicted labels, actual labels: float64 [N, 3]."""
        ours, theirs = logits > 0, self.label_array(rows) > 0
        return np.stack([(ours & theirs).sum(1), ours.sum(1), theirs.sum(1)], axis=1).astype(np.float64)

    def value(self, sums: Array) -> Array:
        """Micro F1."""
        return f1_of(sums)

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Macro F1: the mean over labels that occur in the rows; nothing where none does."""
        ours, theirs = logits > 0, self.label_array(rows) > 0
        there = theirs.any(axis=0)
        f1 = 2 * (ours & theirs).sum(0) / np.maximum(ours.sum(0) + theirs.sum(0), 1)
        return {"macro F1": float(f1[there].mean())} if there.any() else {}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        """Each label of each row."""
        of, labels = np.nonzero(self.label_array(rows) > 0)
        return Items(of, labels, logits[of])

    def chosen(self, items: Items) -> Array:
        """The label where it is predicted, else −1."""
        return np.where(items.logits[np.arange(len(items.labels)), items.labels] > 0, items.labels, -1)


class Number(Classes):
    """Regression: a row's `label` is a number, and the prediction is the one logit."""

    metric: ClassVar = Metric("Pearson correlation")
    problem: ClassVar[str] = "regression"
    objective: ClassVar[Objective] = "number"
    function: ClassVar[Function] = "none"
    one_label: ClassVar[bool] = False
    has_names: ClassVar[bool] = False
    # A logit and a label to count from, the same in all calls, so that sums over parts of the data add up.
    _near: tuple[float, float] | None = None

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        try:
            fractions = any(float(row["label"]) % 1 for row in rows if row["label"] not in (None, ""))
        except (TypeError, ValueError):
            return ""
        return "the labels are numbers with fractions" if fractions else ""

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
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
    correct = Task.correct  # type: ignore[assignment] # a number is not right or wrong

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        return ["value"]

    def label_array(self, rows: Iterable[Row]) -> Array:
        """float32 [N, 1]; NaN for a row without one."""
        values = [row.get("label") for row in rows]
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float32)[:, None]

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        x, y = logits[:, 0].astype(np.float64), self.label_array(rows)[:, 0].astype(np.float64)
        if self._near is None and len(rows) and np.isfinite(x[0] + y[0]):
            self._near = x[0], y[0]
        near_x, near_y = self._near or (0.0, 0.0)
        return products(x - near_x, y - near_y)

    def value(self, sums: Array) -> Array:
        return pearson(sums)

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Spearman's correlation: Pearson's of the ranks."""
        x, y = (mid_ranks(side[:, 0]) for side in (logits, self.label_array(rows)))
        return {"Spearman correlation": float(self.value(products(x - x.mean(), y - y.mean()).sum(axis=0)))}
