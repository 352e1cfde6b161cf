import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from kdexport.tasks.metrics import cohen_kappa, confusion_matrix, mcnemar_p, softmax, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (96, 100), (430, 446)])
def test_wilson_interval_agrees_with_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (10, 10), (0, 6), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    a = np.array([True] * only_a + [False] * only_b + [True] * 5)
    b = np.array([False] * only_a + [True] * only_b + [True] * 5)
    n = only_a + only_b
    expected = binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar_p(a, b) == pytest.approx(expected, rel=1e-6)


def test_kappa_agrees_with_sklearn():
    random = np.random.default_rng(0)
    labels, answers = random.integers(0, 4, 200), random.integers(0, 4, 200)
    answers[:120] = labels[:120]
    assert cohen_kappa(confusion_matrix(labels, answers, 4)) == pytest.approx(cohen_kappa_score(labels, answers))


def test_softmax_of_huge_logits_does_not_overflow():
    assert softmax(np.array([[1e5, 0.0]])).tolist() == [[1.0, 0.0]]
