"""Answers that are labels: logits [N, C] → the label of each row, its scores, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import msgspec
import numpy as np

from kdexport.tasks.base import Objective, Task
from kdexport.tasks.config import Function, Items, Row
from kdexport.tasks.metrics import Array, Metric, confusion_matrix

# The index that PyTorch's cross-entropy passes over.
_NO_LABEL = -100


def function_of(labels: int, problem_type: str | None) -> Function:
    """The function from logits to scores that transformers' pipeline takes for a model of so many labels.

    As in transformers 4.57, `TextClassificationPipeline.postprocess`: regression is asked first, and one label
    means sigmoid even where the problem type says single-label.
    """
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or labels == 1 else "softmax"


class Prediction(msgspec.Struct, frozen=True):
    """The answer for one row: the best label and its score; `values` are the scores of all `labels`, in order."""

    label: str
    score: float
    values: list[float]
    labels: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """Label → score. Made when asked for: of 150 labels it takes as long as a small model's layer."""
        return dict(zip(self.labels, self.values, strict=True))

    def to_dict(self, scores: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"label": self.label, "score": round(self.score, 6)}
        return found | {"scores": {label: round(score, 6) for label, score in self.scores.items()}} if scores else found

    def __repr__(self) -> str:
        return f"Prediction(label={self.label!r}, score={self.score:.4f})"


class Classes(Task):
    """The side of a task that answers each row with one of `config.labels`; a row's `label` is its name."""

    metric: ClassVar = Metric("accuracy", kind="fraction")
    objective: ClassVar[Objective] = "classes"
    one_label: ClassVar[bool] = True

    # --- rows as they come

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        """A row whose label is a text without spaces around it; or what is wrong with it."""
        return row | {"label": None if row["label"] is None else str(row["label"]).strip()}

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return {row["label"]} - {None}

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """The order of logits: numbers by value, names by alphabet."""
        numbers = all(label.isdecimal() for label in labels)
        return sorted(labels, key=(lambda label: (int(label), label)) if numbers else None)

    @staticmethod
    def stratum(row: Row) -> str:
        return str(row["label"])

    # --- logits → answers

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """The highest score of each row, float64 [N]."""
        return np.asarray(self.scores(logits).max(axis=1))

    def decode(self, logits: Array, rows: Sequence[Row] = ()) -> list[Prediction]:
        """Logits [N, C] → the label with the highest score of each row, with the scores of all."""
        best, scores = logits.argmax(axis=1).tolist(), self.scores(logits).tolist()
        pairs = zip(best, scores, strict=True)
        return [Prediction(self.labels[i], values[i], values, self.labels) for i, values in pairs]

    def agrees(self, logits: Array, reference: Array) -> Array:
        """Whether each row has the same answer in both: bool [N].

        The same answer is the same label (softmax), the same labels above one half (sigmoid), or numbers that are
        no further apart than a tenth of the reference's own spread over the rows (none).
        """
        match self.config.function:
            case "softmax":
                return np.asarray(logits.argmax(axis=1) == reference.argmax(axis=1))
            case "sigmoid":
                return np.asarray(((logits > 0) == (reference > 0)).all(axis=1))
            case "none":
                return np.asarray((np.abs(logits - reference) <= 0.1 * reference.std(axis=0)).all(axis=1))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """The rows' labels as indices int64 [N]; −100, which losses pass over, for a row without one."""
        return np.array([self._place(row["label"]) for row in rows], dtype=np.int64)

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Whether each row, all of them labelled, is answered rightly: bool [N]; its mean is the metric, accuracy."""
        return np.asarray(logits.argmax(axis=-1) == self.label_array(rows))

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """What each row adds to the metric: (1 if it is right, 1), float64 [N, 2]."""
        right = self.correct(logits, rows).astype(np.float64)
        return np.stack([right, np.ones_like(right)], axis=1)

    def value(self, sums: Array) -> Array:
        """Accuracy, of sums [..., 2] of counts."""
        return np.asarray(sums[..., 0] / sums[..., 1])

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics beside the one that counts: macro F1, the mean over the classes that the rows have."""
        counts = confusion_matrix(self.label_array(rows), logits.argmax(axis=1), len(self.labels))
        right, there = np.diag(counts), counts.sum(axis=1)
        f1 = 2 * right / np.maximum(there + counts.sum(axis=0), 1)
        return {"macro F1": float(f1[there > 0].mean())}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        targets = self.label_array(rows)
        of = (targets != _NO_LABEL).nonzero()[0]
        return Items(of, targets[of], logits[of])

    # --- inside

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    def _place(self, label: str | None) -> int:
        if label is None:
            return _NO_LABEL
        # A label that is a number and no name is a place in the model's order.
        return self._index[label] if label in self._index else int(label)
