"""Metrics with their intervals: closed forms for shares, rows drawn again for everything else."""

import numpy as np
import pytest

from kdexport.tasks import judging
from kdexport.tasks.classes import Classes
from kdexport.tasks.metrics import Metric, mcnemar_p, paired_difference, wilson_interval


class Accuracy(Classes):
    """Three labels, and nothing to read."""

    labels = ("a", "b", "c")


class Resampled(Accuracy):
    """The same metric, as if there were no closed form for it."""

    metric = Metric("accuracy")


@pytest.fixture(scope="module")
def answers():
    draw = np.random.default_rng(3)
    rows = [{"label": label} for label in draw.choice(["a", "b", "c"], 600)]
    right = np.eye(3)[Accuracy().label_array(rows)]
    return rows, right + draw.normal(0, 0.6, (600, 3)), right + draw.normal(0, 0.4, (600, 3))


def test_accuracy_has_closed_forms(answers):
    rows, first, second = answers
    a, b = (Accuracy().correct(logits, rows) for logits in (first, second))
    assert judging.metric(Accuracy(), first, rows) == a.mean()
    assert judging.metric_interval(Accuracy(), first, rows) == (a.mean(), wilson_interval(int(a.sum()), 600))
    assert judging.difference(Accuracy(), first, second, rows) == paired_difference(a, b)
    assert judging.mcnemar(Accuracy(), first, second, rows) == mcnemar_p(a, b)
    assert judging.wrong_rows(Accuracy(), first, rows) == np.flatnonzero(~a).tolist()


def test_drawing_rows_again_comes_to_nearly_the_same(answers):
    rows, first, second = answers
    for plain, drawn in (
        (judging.metric_interval(task, first, rows) for task in (Accuracy(), Resampled())),
        (judging.difference(task, first, second, rows) for task in (Accuracy(), Resampled())),
    ):
        assert drawn[0] == pytest.approx(plain[0])
        assert drawn[1] == pytest.approx(plain[1], abs=0.005)


def test_a_pair_is_told_apart_better_than_its_members(answers):
    """The same rows are drawn for both, so what is hard for both cancels out."""
    rows, first, _ = answers
    again = first + np.random.default_rng(4).normal(0, 0.01, first.shape)
    _, (low, high) = judging.metric_interval(Resampled(), first, rows)
    _, (lower, higher) = judging.difference(Resampled(), first, again, rows)
    assert higher - lower < (high - low) / 3
