"""Metrics of predictions, with their uncertainty; numpy only."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Metric(NamedTuple):
    """A task's primary metric.

    `kind` is fraction (of correct rows, which has closed-form intervals), ratio (between 0 and 1, shown in percent) or
    number (in a unit of its own).
    """

    name: str
    higher_is_better: bool = True
    kind: Literal["fraction", "ratio", "number"] = "ratio"

    def gain(self, before: float, after: float) -> float:
        """The improvement from `before` to `after`; negative where it is worse."""
        return after - before if self.higher_is_better else before - after

    def text(self, value: float) -> str:
        return f"{value:.3f}" if self.kind == "number" else f"{value:.2%}"

    def retention(self, value: float, reference: float) -> float:
        """The fraction of a reference's quality: 1 is as good, 0 where it is undefined."""
        above, below = (value, reference) if self.higher_is_better else (reference, value)
        return above / below if below else 0.0


class Keeps(NamedTuple):
    """The least agreement with fp32 of an int8 file that is recommended, and how an agreement over rows reads."""

    least: float
    text: str


def softmax(logits: Array) -> Array:
    """Return probabilities along the last axis, without overflow."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def log_softmax(logits: Array) -> Array:
    """Return log probabilities along the last axis, float32, without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sigmoid(logits: Array) -> Array:
    """Return the probability of each logit, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a fraction by Wilson's score method (Wilson 1927), which holds near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(right_a: Array, right_b: Array) -> float:
    """Return the p-value of McNemar's exact two-sided test (McNemar 1947) of correct rows, bool [N] each."""
    only_a = int(np.sum(right_a & ~right_b))
    only_b = int(np.sum(~right_a & right_b))
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    # in log space, as comb(n, i) overflows floats from a thousand discordant rows
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs))


def paired_difference(right_a: Array, right_b: Array) -> tuple[float, tuple[float, float]]:
    """Return the accuracy of b minus that of a, bool [N] each, with a 95 % interval (Agresti and Min 2005)."""
    n = len(right_a)
    gained, lost = int(np.sum(~right_a & right_b)), int(np.sum(right_a & ~right_b))
    # half a row more in each of the four cells: better coverage where few rows differ
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    centre, half = (b - c) / m, 1.959964 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return (gained - lost) / n, (max(-1.0, centre - half), min(1.0, centre + half))


def reliability(probabilities: Array, labels: Array, bins: int = 10) -> tuple[float, list[tuple[float, float, int]]]:
    """Return the expected calibration error over bins of equal width (Guo et al. 2017, eq. 3), and its table.

    `probabilities` are [N, C], `labels` int [N]; the table has (mean confidence, accuracy, rows) of each non-empty bin.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    filled = [place == i for i in range(bins) if np.any(place == i)]
    table = [(float(confidence[rows].mean()), float(right[rows].mean()), int(rows.sum())) for rows in filled]
    return sum(n * abs(c - a) for c, a, n in table) / len(labels), table


def cohen_kappa(confusion: Array) -> float:
    """Return Cohen's kappa (Cohen 1960) of counts [C, C] (rows are labels): 0 is chance, 1 is perfect."""
    n = confusion.sum()
    if n == 0:
        return 0.0
    observed = np.trace(confusion) / n
    expected = float(confusion.sum(axis=1) @ confusion.sum(axis=0)) / n**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else 0.0


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Return counts [C, C]; rows are labels, columns are predictions."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def f1_of(sums: Array) -> Array:
    """Return F1 for counts [..., 3], true positives, predicted, actual; 1 where nothing is predicted or actual."""
    both = sums[..., 1] + sums[..., 2]
    return np.asarray(np.where(both > 0, 2 * sums[..., 0] / np.maximum(both, 1), 1.0))


def roc_auc(positives: Array, negatives: Array) -> tuple[float, tuple[float, float]]:
    """Return the area under the ROC curve, with a 95 % interval (DeLong, DeLong and Clarke-Pearson 1988).

    The area is the probability that a positive scores higher than a negative, ties counting half, computed from
    mid-ranks (Sun and Xu 2014, eq. 5 to 8) in O(n log n). The interval is Wald's, clipped to 0 and 1: it has no width
    for perfectly separated scores, and is 0 to 1 where a side has a single score.

    Raises:
        ValueError: a side is empty, or a score is not a number.
    """
    m, n = len(positives), len(negatives)
    scores = np.concatenate([positives, negatives]).astype(np.float64)
    if not m or not n or np.isnan(scores).any():
        raise ValueError(f"an ROC curve wants scores on both sides: {m} and {n}, {np.isnan(scores).sum()} of them NaN")
    ranks = mid_ranks(scores)
    below = (ranks[:m] - mid_ranks(scores[:m])) / n  # for each positive, the fraction of negatives below
    above = 1 - (ranks[m:] - mid_ranks(scores[m:])) / m
    area = float(below.mean())
    if m < 2 or n < 2:
        return area, (0.0, 1.0)
    half = 1.959964 * math.sqrt(below.var(ddof=1) / m + above.var(ddof=1) / n)
    return area, (max(0.0, area - half), min(1.0, area + half))


def best_threshold(positives: Array, negatives: Array) -> tuple[float, float]:
    """Return the maximum of TPR − FPR over all thresholds (Youden's J), and its 95 % bound under chance.

    The threshold is chosen with hindsight, so J is never below 0; the bound holds when both sides have the same
    distribution (Smirnov 1944: P(J > d) → exp(−2 d² m n / (m + n))). Each side has at least one score.
    """
    m, n = len(positives), len(negatives)
    thresholds = np.unique(np.concatenate([positives, negatives]))
    missed = [np.searchsorted(np.sort(side), thresholds) / len(side) for side in (positives, negatives)]
    by_chance = min(1.0, math.sqrt(-math.log(0.05) / 2 * (m + n) / (m * n)))
    return max(0.0, float((missed[1] - missed[0]).max())), by_chance


def mid_ranks(scores: Array) -> Array:
    """Return ranks [N] from 1; ties share their mean."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def products(x: Array, y: Array) -> Array:
    """Return 1, x, y, x², y² and xy of each row, float64 [N, 6]; sums of numbers near 0 lose fewer digits."""
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def pearson(sums: Array) -> Array:
    """Return Pearson's correlation for sums [..., 6] of `products`; 0 where one side does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums), -1, 0)
    spread = np.maximum((n * xx - x * x) * (n * yy - y * y), 0.0)
    return np.asarray(np.where(spread > 0, (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-300)), 0.0))
