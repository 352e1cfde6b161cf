"""Single-label classification: logits [N, C] → one label for each row, its scores, accuracy."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from kdexport.tasks.base import Objective, Task
from kdexport.tasks.config import NO_LABEL, Function, Items, Row
from kdexport.tasks.judging import metric
from kdexport.tasks.metrics import Array, Metric, confusion_matrix

# Below this F1 or correlation a teacher is no better than chance.
_CHANCE = 0.1


def function_of(labels: int, problem_type: str | None) -> Function:
    """Return the function from logits to scores that transformers' pipeline uses for a model with so many labels.

    As in transformers 4.57, `TextClassificationPipeline.postprocess`: regression is checked first, and a single label
    means sigmoid even where the problem type is single-label.
    """
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or labels == 1 else "softmax"


class Prediction(msgspec.Struct, frozen=True):
    """The best label and its score; `values` are the scores of all `labels`, in order."""

    label: str
    score: float
    values: list[float]
    labels: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """Label → score, built on access: for 150 labels it takes as long as a layer of a small model."""
        return dict(zip(self.labels, self.values, strict=True))

    def to_dict(self, scores: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"label": self.label, "score": round(self.score, 6)}
        return found | {"scores": {label: round(score, 6) for label, score in self.scores.items()}} if scores else found

    def __repr__(self) -> str:
        return f"Prediction(label={self.label!r}, score={self.score:.4f})"


class Classes(Task):
    """The output side of tasks whose answer is one of `config.labels`; a row's `label` is its name."""

    metric: ClassVar = Metric("accuracy", kind="fraction")
    objective: ClassVar[Objective] = "classes"
    one_label: ClassVar[bool] = True

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        return row | {"label": None if row["label"] is None else str(row["label"]).strip()}

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return {row["label"]} - {None}

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """Numbers by value, names alphabetically."""
        numbers = all(label.isdecimal() for label in labels)
        return sorted(labels, key=(lambda label: (int(label), label)) if numbers else None)

    @staticmethod
    def stratum(row: Row) -> str:
        return str(row["label"])

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """The highest score."""
        return np.asarray(self.scores(logits).max(axis=1))

    def decode(self, logits: Array, rows: Sequence[Row] = ()) -> list[Prediction]:
        best, scores = logits.argmax(axis=1).tolist(), self.scores(logits).tolist()
        return [Prediction(self.labels[i], row[i], row, self.labels) for i, row in zip(best, scores, strict=True)]

    def agrees(self, logits: Array, reference: Array) -> Array:
        """bool [N]: the same label (softmax), the same labels above one half (sigmoid), or a difference of at most a
        tenth of the reference's standard deviation over the rows (none).
        """
        match self.config.function:
            case "softmax":
                return np.asarray(logits.argmax(axis=1) == reference.argmax(axis=1))
            case "sigmoid":
                return np.asarray(((logits > 0) == (reference > 0)).all(axis=1))
            case "none":
                return np.asarray((np.abs(logits - reference) <= 0.1 * reference.std(axis=0)).all(axis=1))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """Indices int64 [N]; −100, the index that losses ignore, for an unlabelled row."""
        index: dict[str | None, int] = {label: i for i, label in enumerate(self.labels)} | {None: NO_LABEL}
        labels = (row["label"] for row in rows)
        # A number that is no label name is an index.
        return np.array([index[label] if label in index else int(label) for label in labels], dtype=np.int64)

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array:
        """All rows must be labelled."""
        return np.asarray(logits.argmax(axis=-1) == self.label_array(rows))

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """(1 if correct, 1): float64 [N, 2]."""
        right = self.correct(logits, rows).astype(np.float64)
        return np.stack([right, np.ones_like(right)], axis=1)

    def value(self, sums: Array) -> Array:
        return np.asarray(sums[..., 0] / sums[..., 1])

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        return metric(self, logits, rows) < _CHANCE

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Macro F1: the mean over the classes that occur in the rows."""
        counts = confusion_matrix(self.label_array(rows), logits.argmax(axis=1), len(self.labels))
        right, there = np.diag(counts), counts.sum(axis=1)
        f1 = 2 * right / np.maximum(there + counts.sum(axis=0), 1)
        return {"macro F1": float(f1[there > 0].mean())}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        targets = self.label_array(rows)
        of = (targets != NO_LABEL).nonzero()[0]
        return Items(of, targets[of], logits[of])
