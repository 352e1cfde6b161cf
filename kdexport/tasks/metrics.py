"""Metrics of predictions, with their uncertainty; numpy only."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Metric(NamedTuple):
    """What a task is judged by.

    `kind` is fraction (of rows that are right, which has closed-form intervals), ratio (between 0 and 1, shown in
    percent) or number (in a unit of its own).
    """

    name: str
    higher_is_better: bool = True
    kind: Literal["fraction", "ratio", "number"] = "ratio"

    def gain(self, before: float, after: float) -> float:
        """Return by how much `after` is better than `before`; negative where it is worse."""
        return after - before if self.higher_is_better else before - after

    def text(self, value: float) -> str:
        """Return a value as people write it."""
        return f"{value:.3f}" if self.kind == "number" else f"{value:.2%}"

    def retention(self, value: float, reference: float) -> float:
        """Return the share of a reference's quality that is retained; 1 is as good, 0 where it is undefined."""
        above, below = (value, reference) if self.higher_is_better else (reference, value)
        return above / below if below else 0.0


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, computed without overflow."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def log_softmax(logits: Array) -> Array:
    """Log probabilities along the last axis, float32, computed without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sigmoid(logits: Array) -> Array:
    """The probability of each logit by itself, computed without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score method (Wilson 1927), which holds near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(right_a: Array, right_b: Array) -> float:
    """Two-sided exact McNemar test of two classifiers on the same rows (McNemar 1947).

    Args:
        right_a, right_b: boolean arrays [N], whether each row was answered rightly.

    Returns:
        The probability of a difference at least this large if both were equally good.
    """
    only_a = int(np.sum(right_a & ~right_b))
    only_b = int(np.sum(~right_a & right_b))
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    # log-space, because comb(n, i) / 2**n overflows floats from a thousand discordant rows on
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs))


def paired_difference(right_a: Array, right_b: Array) -> tuple[float, tuple[float, float]]:
    """Accuracy of b less that of a on the same rows, with a 95 % interval (Agresti and Min 2005).

    Args:
        right_a, right_b: boolean arrays [N], whether each row was answered rightly.
    """
    n = len(right_a)
    gained, lost = int(np.sum(~right_a & right_b)), int(np.sum(right_a & ~right_b))
    # half a row in each of the four cells keeps the interval honest where few rows differ
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    centre, half = (b - c) / m, 1.959964 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return (gained - lost) / n, (max(-1.0, centre - half), min(1.0, centre + half))


def reliability(probabilities: Array, labels: Array, bins: int = 10) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error over bins of equal width (Guo et al. 2017, eq. 3).

    Args:
        probabilities: [N, C], rows sum to 1.
        labels: int [N].

    Returns:
        The error, and (mean confidence, accuracy, rows) of every bin that holds rows.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    filled = [place == i for i in range(bins) if np.any(place == i)]
    table = [(float(confidence[rows].mean()), float(right[rows].mean()), int(rows.sum())) for rows in filled]
    return sum(n * abs(c - a) for c, a, n in table) / len(labels), table


def cohen_kappa(confusion: Array) -> float:
    """Agreement beyond chance of predictions and labels (Cohen 1960): 0 is chance, 1 is perfect.

    Args:
        confusion: counts [C, C], rows are labels, columns are predictions.
    """
    n = confusion.sum()
    if n == 0:
        return 0.0
    observed = np.trace(confusion) / n
    expected = float(confusion.sum(axis=1) @ confusion.sum(axis=0)) / n**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else 0.0


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Counts [C, C]; rows are labels, columns are predictions."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def f1_of(sums: Array) -> Array:
    """F1 of counts [..., 3]: found rightly, found, there; 1 where nothing is there and nothing was found."""
    both = sums[..., 1] + sums[..., 2]
    return np.asarray(np.where(both > 0, 2 * sums[..., 0] / np.maximum(both, 1), 1.0))


def roc_auc(positives: Array, negatives: Array) -> tuple[float, tuple[float, float]]:
    """Area under the ROC curve, with a 95 % interval (DeLong, DeLong and Clarke-Pearson 1988).

    The area is the probability that a positive scores higher than a negative, ties counting half. Placements come
    from mid-ranks (Sun and Xu 2014, eq. 5 to 8), in O(n log n). The interval is Wald's, cut at 0 and 1: it has no
    width where the two don't overlap at all, and says nothing where a side has a single score.

    Args:
        positives, negatives: scores [M] and [N] of both sides, at least one each.

    Raises:
        ValueError: a side is empty, or a score is not a number.
    """
    m, n = len(positives), len(negatives)
    scores = np.concatenate([positives, negatives]).astype(np.float64)
    if not m or not n or np.isnan(scores).any():
        raise ValueError(f"an ROC curve wants scores on both sides: {m} and {n}, {np.isnan(scores).sum()} of them NaN")
    ranks = _mid_ranks(scores)
    below = (ranks[:m] - _mid_ranks(scores[:m])) / n  # of each positive, the share of negatives that score less
    above = 1 - (ranks[m:] - _mid_ranks(scores[m:])) / m
    area = float(below.mean())
    if m < 2 or n < 2:
        return area, (0.0, 1.0)
    half = 1.959964 * math.sqrt(below.var(ddof=1) / m + above.var(ddof=1) / n)
    return area, (max(0.0, area - half), min(1.0, area + half))


def best_threshold(positives: Array, negatives: Array) -> tuple[float, float]:
    """The largest TPR − FPR that any threshold on the scores has (Youden's J), and how large chance makes it.

    Returns:
        It, and what it stays below in 95 % of cases when both sides score alike: the threshold is chosen with
        hindsight, so it is never below 0 (Smirnov 1944: P(J > d) → exp(−2 d² m n / (m + n))).

    Args:
        positives, negatives: scores [M] and [N] of both sides, at least one each.
    """
    m, n = len(positives), len(negatives)
    thresholds = np.unique(np.concatenate([positives, negatives]))
    missed = [np.searchsorted(np.sort(side), thresholds) / len(side) for side in (positives, negatives)]
    by_chance = min(1.0, math.sqrt(-math.log(0.05) / 2 * (m + n) / (m * n)))
    return max(0.0, float((missed[1] - missed[0]).max())), by_chance


def _mid_ranks(scores: Array) -> Array:
    """Ranks from 1 on, [N]; equal scores share the mean of theirs."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])
