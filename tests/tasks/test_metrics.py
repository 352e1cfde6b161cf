import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, roc_auc_score, roc_curve

from kdexport.tasks.metrics import (
    best_threshold,
    cohen_kappa,
    confusion_matrix,
    mcnemar_p,
    roc_auc,
    softmax,
    wilson_interval,
)


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


def two_sides(m, n, shift, ties, seed=0):
    random = np.random.default_rng(seed)
    sides = random.normal(shift, 1, m), random.normal(0, 1.5, n)
    return tuple(np.round(side, 1) if ties else side for side in sides)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("m", "n", "shift"), [(300, 200, 0.0), (150, 400, 1.0), (200, 90, 3.0)])
def test_auc_and_its_interval_agree_with_sklearn_and_a_bootstrap(m, n, shift, ties):
    positives, negatives = two_sides(m, n, shift, ties)
    truth = np.repeat([1, 0], [m, n])
    area, (low, high) = roc_auc(positives, negatives)
    assert area == pytest.approx(roc_auc_score(truth, np.concatenate([positives, negatives])), abs=1e-12)
    random = np.random.default_rng(1)
    drawn = [roc_auc(random.choice(positives, m), random.choice(negatives, n))[0] for _ in range(2000)]
    expected = np.quantile(drawn, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.12 * (high - low))


def test_delongs_variance_is_that_of_its_definition():
    positives, negatives = two_sides(40, 30, 0.5, ties=True)
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    variance = wins.mean(axis=1).var(ddof=1) / 40 + wins.mean(axis=0).var(ddof=1) / 30
    area, (low, high) = roc_auc(positives, negatives)
    assert area == pytest.approx(wins.mean())
    assert (high - low) / 2 == pytest.approx(1.959964 * variance**0.5)


def test_auc_of_equal_apart_few_and_no_scores():
    assert roc_auc(np.ones(5), np.ones(9)) == (0.5, (0.5, 0.5))
    assert roc_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == (1.0, (1.0, 1.0))
    assert roc_auc(np.array([2.0]), np.array([0.0, 1.0])) == (1.0, (0.0, 1.0))
    for bad in (np.array([]), np.array([np.nan])):
        with pytest.raises(ValueError, match="an ROC curve wants scores on both sides"):
            roc_auc(np.ones(2), bad)


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_threshold_is_that_of_sklearns_curve(ties):
    positives, negatives = two_sides(150, 400, 0.7, ties)
    fpr, tpr, _ = roc_curve(
        np.repeat([1, 0], [150, 400]), np.concatenate([positives, negatives]), drop_intermediate=False
    )
    assert best_threshold(positives, negatives)[0] == pytest.approx((tpr - fpr).max())
    assert best_threshold(np.zeros(5), np.ones(5))[0] == 0.0


def test_chance_stays_below_its_bound_in_95_percent():
    random = np.random.default_rng(0)
    found = [best_threshold(random.normal(size=200), random.normal(size=300)) for _ in range(1000)]
    assert np.mean([value > by_chance for value, by_chance in found]) == pytest.approx(0.05, abs=0.02)
    assert best_threshold(np.ones(1), np.ones(1))[1] == 1.0
