"""How far the answers of a teacher that was asked can be trusted, by labelled rows and without them."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import chisquare

from kdexport.results import Alike, Metric
from kdexport.tasks.base import Task
from kdexport.tasks.config import Row
from kdexport.tasks.judging import metric_interval
from kdexport.tasks.metrics import Array, log_softmax, reliability, sigmoid, softmax, wilson_interval

_TEMPERATURES = 0.05, 20.0
_SPLIT, _OFTEN, _FEWEST = 0.25, 0.2, 3  # of alike labels: the second's probability, the fraction of rows, and rows
_BY_CHANCE, _IN_A_GROUP = 0.01, 8  # of positions: the p-value, and rows expected in each group
_NO_LABELS, _ONE_LABEL, _OTHER_ORDER, _BETTER = 0.5, 0.8, 0.7, 0.1


def accuracy(task: Task, logits: Array, rows: Sequence[Row]) -> Metric:
    """Return the task's metric on labelled rows, with its interval."""
    return Metric(*metric_interval(task, logits, rows), len(rows))


def fitted_temperature(logits: Array, labels: Array) -> float:
    """Return the temperature by which logits [n, C] are most likely to give the labels (Guo et al. 2017).

    `labels` are int [n], or float [n, C] for several labels a row. They are smoothed as if one more row had answers by
    chance (Platt 1999), so that a few rows which are all right do not ask for certainty.
    """
    wanted = _smoothed(logits, labels)

    def loss(power: float) -> float:
        scaled = logits.astype(np.float64) / math.exp(power)
        if labels.ndim == 1:
            return float(-(wanted * log_softmax(scaled)).sum())
        return float((np.logaddexp(0.0, scaled) - wanted * scaled).sum())

    low, high = (math.log(t) for t in _TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)


def calibration(logits: Array, labels: Array) -> tuple[float, float]:
    """Return the expected calibration error without and with a temperature, which is fitted on other rows."""
    half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    scaled = logits.astype(np.float64)
    for fitted in (half, ~half):
        if fitted.any() and not fitted.all():
            scaled[~fitted] /= fitted_temperature(logits[fitted], labels[fitted])
    return _calibration_error(logits.astype(np.float64), labels), _calibration_error(scaled, labels)


def order_agreement(task: Task, first: Array, second: Array) -> Metric:
    """Return the fraction of rows with the same answer in two orders of the options, with its interval."""
    same = int(task.agrees(first, second).sum())
    return Metric(same / len(first), wilson_interval(same, len(first)), len(first))


def position_bias(taken: Array, options: int) -> str:
    """Return a sentence where options are taken for their place beyond chance; empty where they are not.

    `taken` int [n] are places, from 0, of the best option, each row's options being in an order of its own. Many places
    are counted in groups of neighbours, as the test needs some rows in each (Pearson's chi-square).
    """
    groups = min(options, len(taken) // _IN_A_GROUP)
    if groups < 2:
        return ""
    of_place = np.arange(options) * groups // options
    found = np.bincount(of_place[taken], minlength=groups)
    expected = len(taken) * np.bincount(of_place, minlength=groups) / options
    p = float(chisquare(found, expected).pvalue)
    if p >= _BY_CHANCE:
        return ""
    most = int((found / expected).argmax())
    places = np.flatnonzero(of_place == most) + 1
    named = f"option {places[0]}" if len(places) == 1 else f"options {places[0]} to {places[-1]}"
    odds = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return (
        f"{named.capitalize()} of {options} is taken in {found[most] / len(taken):.0%} of the rows, "
        f"{expected[most] / len(taken):.0%} by chance (chi-square, {odds})"
    )


def alike(task: Task, first: Array, second: Array | None = None) -> list[Alike]:
    """Return the pairs of labels that the teacher hardly tells apart, the most frequent first.

    In a row of such a pair its probability is split between the two, or its answer changes from one to the other with
    the order of options; these are a good part of all rows with an answer of the two.
    """
    if task.config.function != "softmax" or len(task.labels) < 2:
        return []
    scores = task.scores(first)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    pairs = [
        tuple(sorted(two)) if row[two[1]] >= _SPLIT else None for two, row in zip(order.tolist(), scores, strict=True)
    ]
    if second is not None:
        other = second.argmax(axis=1).tolist()
        pairs = [
            tuple(sorted((a, b))) if a != b else pair
            for (a, _), b, pair in zip(order.tolist(), other, pairs, strict=True)
        ]
    answers = Counter(order[:, 0].tolist())
    found = [
        Alike(task.labels[a], task.labels[b], rows)
        for (a, b), rows in Counter(filter(None, pairs)).most_common()
        if rows >= max(_FEWEST, _OFTEN * (answers[a] + answers[b]))
    ]
    return found


def cause(
    task: Task,
    logits: Array,
    *,
    mass: float | None = None,
    same_in_another_order: float | None = None,
    asked_by: str = "",
    right: float | None = None,
    right_by_words: float | None = None,
) -> str:
    """Return the likely cause of answers near chance on labelled rows, and the remedy.

    `right` and `right_by_words` are the metric as it was asked, and when the same rows are asked by the labels' words.
    """
    if right is not None and right_by_words is not None and right_by_words >= right + _BETTER:
        found = f"asked by the labels' own words it answers {right_by_words:.0%} of the same rows rightly"
        return f"It may not follow {asked_by or 'letters'}: {found}. Set teacher.ask.by: words"
    if mass is not None and mass < _NO_LABELS:
        return (
            f"Only {mass:.0%} of its probability is on the labels: it wants to answer something else. Say in "
            "teacher.ask.instruction what is asked and what it shall answer, or name a model that follows instructions"
        )
    if task.config.function == "softmax":
        answers = logits.argmax(axis=1)
        most = int(np.bincount(answers).argmax())
        if (share := float((answers == most).mean())) >= _ONE_LABEL:
            return (
                f"It answers {task.labels[most]!r} to {share:.0%} of the texts. Describe each label in data.labels, "
                "and show rows of each: teacher.ask.examples"
            )
    if same_in_another_order is not None and same_in_another_order < _OTHER_ORDER:
        return (
            f"Its answers depend on the order of options: {same_in_another_order:.0%} stay the same in another one. "
            "Ask in several, teacher.ask.orders: 4, or name a larger model"
        )
    return (
        "Do the labels' names say what they mean? Describe them in data.labels, or say in teacher.ask.instruction what "
        "they are about; or the model is too small"
    )


def _smoothed(logits: Array, labels: Array) -> Array:
    n, classes = logits.shape
    if labels.ndim == 1:
        certain, chance = np.eye(classes)[labels], 1 / classes
    else:
        certain, chance = labels.astype(np.float64), 0.5
    return np.asarray((n * certain + chance) / (n + 1))


def _calibration_error(logits: Array, labels: Array) -> float:
    if labels.ndim == 1:
        return reliability(softmax(logits), labels)[0]
    yes = sigmoid(logits).ravel()
    return reliability(np.stack([1 - yes, yes], axis=1), labels.ravel().astype(int))[0]
