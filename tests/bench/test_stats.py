"""What may be said of samples: held to scipy, to hand-computed values, and to what repeated trials do."""

import math

import numpy as np
import pytest
import scipy.stats

from kdexport.bench import stats


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 11, 29, 99])
@pytest.mark.parametrize("p", [0.9, 0.975, 0.99375])
def test_students_t_is_scipys(freedom, p):
    assert stats.t_quantile(p, freedom) == pytest.approx(
        scipy.stats.t.ppf(p, freedom), rel=0.03 if freedom == 3 else 0.01
    )


def test_ratios_are_paired_by_round_so_drift_cancels():
    found = stats.ratio([10, 20, 40], [1, 2, 4])
    assert found.value == pytest.approx(10)
    assert found.ci95 == pytest.approx((10, 10))


def test_a_few_rounds_get_students_t():
    logs = np.log([10, 11, 12, 9, 10])
    half = scipy.stats.t.ppf(0.975, 4) * np.std(logs, ddof=1) / np.sqrt(5)
    found = stats.ratio([10, 11, 12, 9, 10], [1] * 5)
    assert found.ci95 == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)), rel=1e-3)


def test_more_rounds_get_wilcoxons_interval():
    """By hand: of ten values the sums of ranks up to 8 have 25 of 1,024 ways (2.4 %), up to 9 have 33."""
    times = np.exp(np.arange(1.0, 11.0) ** 2 / 50)
    logs = np.log(times)
    means = sorted((logs[i] + logs[j]) / 2 for i in range(10) for j in range(i, 10))
    assert stats.ratio(times, np.ones(10)).ci95 == pytest.approx((math.exp(means[8]), math.exp(means[-9])))


@pytest.mark.parametrize("rounds", [5, 6, 12, 24])
def test_the_interval_of_a_ratio_holds_the_truth_in_19_of_20_trials(rounds):
    random = np.random.default_rng(rounds)
    noise = random.standard_t(4, size=(2000, rounds)) * 0.03  # heavier tails than the normal's
    held = sum(low <= 1 <= high for low, high in (stats.ratio(np.exp(row), np.ones(rounds)).ci95 for row in noise))
    assert held / 2000 > 0.935


def test_one_disturbed_round_does_not_hide_a_difference():
    steady = np.exp(np.random.default_rng(0).normal(0, 0.02, 12))
    slower = 1.1 * np.exp(np.random.default_rng(1).normal(0, 0.02, 12))
    steady[3] *= 3
    assert stats.ratio(steady, slower).verdict == "slower"


@pytest.mark.parametrize(
    ("ci", "verdict"),
    [
        ((1.06, 1.2), "faster"),
        ((1.01, 1.2), "faster"),
        ((0.8, 0.94), "slower"),
        ((0.97, 1.04), "same"),
        ((1.01, 1.03), "same"),
        ((0.98, 1.3), "unsure"),
    ],
)
def test_there_are_four_verdicts(ci, verdict):
    assert stats.verdict(ci) == verdict


@pytest.mark.parametrize("rounds", [1, 2])
def test_fewer_than_three_rounds_allow_no_interval(rounds):
    """Student's t of two rounds reaches from 1e-12 to 1e+12 ms where they differ."""
    found = stats.ratio([2.0, 3.0][:rounds], [1.0, 1.5][:rounds])
    assert found.value == pytest.approx(2)
    assert found.ci95 is None
    assert found.verdict == "unsure"
    assert stats.estimate([2.0, 3.0][:rounds])[1] is None
    assert stats.pooled([np.linspace(1, 2, 1000), np.linspace(2, 3, 1000)][:rounds], 0.99)[1] is None
    assert stats.ratio([2.0, 3.0, 4.0], [1.0, 1.5, 2.0]).ci95 is not None


def test_p99_wants_a_thousand_samples():
    rounds = [np.linspace(1, 2, 333)] * 3
    assert stats.pooled(rounds, 0.99) == (None, None)
    value, ci = stats.pooled([np.linspace(1, 2, 334)] * 3, 0.99)
    assert value == pytest.approx(1.99, abs=0.01)
    assert ci == pytest.approx((value, value))


def test_below_that_there_is_a_bound_by_order_statistics():
    """1 − 0.99²⁹⁹ is the first above 95 %, so of 298 samples nothing can be said, of 299 the slowest bounds it."""
    samples = np.arange(1.0, 300.0)
    assert stats.at_most([samples[:298]], 0.99) is None
    assert stats.at_most([samples], 0.99) == 299
    assert stats.at_most([np.arange(1.0, 474.0)], 0.99) == 472  # 473 is where the second slowest will do


def test_the_bound_knows_that_samples_of_a_round_hang_together():
    random, held = np.random.default_rng(5), 0
    truth = float(np.quantile(np.exp(random.normal(0, 0.1, 400_000) + random.normal(0, 0.05, 400_000)), 0.99))
    for _ in range(200):
        rounds = [np.exp(random.normal(0, 0.1, 130) + random.normal(0, 0.05)) for _ in range(6)]
        held += stats.at_most(rounds, 0.99) >= truth
    assert held / 200 > 0.85  # by order statistics alone it is 73 %


def test_the_interval_of_a_p99_holds_the_truth_where_rounds_differ():
    """Samples of one round hang together: intervals over calls would hold the truth far too seldom."""
    random, held = np.random.default_rng(7), 0
    truth = float(np.quantile(np.exp(random.normal(0, 0.1, 400_000) + random.normal(0, 0.05, 400_000)), 0.99))
    for _ in range(200):
        rounds = [np.exp(random.normal(0, 0.1, 400) + random.normal(0, 0.05)) for _ in range(8)]
        low, high = stats.pooled(rounds, 0.99)[1]
        held += low <= truth <= high
    assert held / 200 > 0.9


def test_ratios_of_p99_are_paired_too():
    random = np.random.default_rng(3)
    drift = [1.0, 1.3, 0.8, 1.1, 1.5, 0.9]
    slow = [d * (1.2 + 0.1 * random.random(400)) for d in drift]
    fast = [d * (1.0 + 0.1 * random.random(400)) for d in drift]
    found = stats.pooled_ratio(slow, fast, 0.99)
    assert found.verdict == "faster"
    assert found.value == pytest.approx(1.3 / 1.1, rel=0.02)


def test_a_slow_model_is_compared_by_its_median_though_not_by_its_p99():
    slow, fast = [np.full(40, 2.0)] * 6, [np.full(40, 1.0)] * 6
    assert stats.pooled_ratio(slow, fast, 0.5).value == pytest.approx(2)
    assert stats.pooled_ratio(slow, fast, 0.99) is None
