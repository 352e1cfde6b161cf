import math

import numpy as np
import pytest

from kdexport.tasks.rankings import mrr, ndcg, recall


def test_ndcg_is_that_of_the_paper_by_hand():
    """Gains in the order of the scores are 3, 2, 3, 0, 1, 2, as in Wikipedia's example of the measure."""
    gains, scores = np.array([3, 2, 3, 0, 1, 2]), np.array([9, 8, 7, 6, 5, 4])
    found = 3 + 2 / math.log2(3) + 3 / 2 + 1 / math.log2(6) + 2 / math.log2(7)
    ideal = 3 + 3 / math.log2(3) + 2 / 2 + 2 / math.log2(5) + 1 / math.log2(6)
    assert found == pytest.approx(6.861, abs=1e-3)
    assert ndcg(scores, gains) == pytest.approx(found / ideal)


def test_what_is_below_the_cut_counts_in_the_ideal_alone():
    gains, scores = np.array([0, 0, 1, 1]), np.array([4.0, 3.0, 2.0, 1.0])
    assert ndcg(scores, gains, k=3) == pytest.approx(0.5 / (1 + 1 / math.log2(3)))
    assert ndcg(scores, gains, k=2) == 0.0
    assert mrr(scores, gains, k=3) == pytest.approx(1 / 3)
    assert mrr(scores, gains, k=2) == 0.0
    assert recall(scores, gains, k=3) == 0.5


def test_each_query_has_a_value():
    scores = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.1, 0.2, 0.3]])
    gains = np.array([[0, 2, 0], [0, 2, 0], [0, 0, 0]])
    assert ndcg(scores, gains).tolist() == [1.0, 0.5, pytest.approx(math.nan, nan_ok=True)]
    assert mrr(scores, gains).tolist() == [1.0, pytest.approx(1 / 3), pytest.approx(math.nan, nan_ok=True)]
    assert recall(scores, gains, k=1).tolist() == [1.0, 0.0, pytest.approx(math.nan, nan_ok=True)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_model_that_scores_all_alike_gains_nothing_whatever_the_order(order):
    gains, scores = np.array([2, 0, 0])[order], np.zeros(3)
    assert ndcg(scores, gains) == 0.5
    assert mrr(scores, gains) == pytest.approx(1 / 3)
    assert recall(scores, gains, k=2) == 0.0


def test_scores_that_are_not_a_number_come_last():
    assert mrr(np.array([math.nan, -1.0]), np.array([1, 0])) == 0.5


def test_gains_below_0_are_those_of_irrelevant_documents():
    assert ndcg(np.array([3.0, 2.0, 1.0]), np.array([1, -1, 1])) == ndcg(np.array([3.0, 2.0, 1.0]), np.array([1, 0, 1]))
