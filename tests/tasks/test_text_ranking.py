import numpy as np
import pytest
from tokenizers import Tokenizer

from kdexport.data import demo
from kdexport.errors import DataError
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.judging import metric, metric_interval
from kdexport.tasks.rankings import ndcg
from kdexport.tasks.text_ranking import TextRanking


def rows(*queries):
    """Rows of queries, each with the gains of its passages."""
    return [
        {"id": f"f:{q}.{i}", "text": f"query {q}", "text_pair": f"passage {i}", "label": None if g is None else str(g)}
        for q, gains in enumerate(queries)
        for i, g in enumerate(gains)
    ]


@pytest.fixture(scope="module")
def task():
    config = TaskConfig(task="text-ranking", labels=["value"], inputs=["input_ids"], max_length=32, function="none")
    return TextRanking(config, Tokenizer.from_file(str(demo.teacher() / "tokenizer.json")))


def test_the_metric_is_the_mean_of_the_queries(task):
    given, scores = rows([0, 2, 1], [1, 0]), np.array([3.0, 2.0, 1.0, 5.0, 9.0], np.float32)[:, None]
    each = [float(ndcg(scores[:3, 0], np.array([0, 2, 1]))), float(ndcg(scores[3:, 0], np.array([1, 0])))]
    assert metric(task, scores, given) == pytest.approx(np.mean(each))
    assert task.further(scores, given) == {"MRR@10": 0.5}
    assert task.stats(scores, given).sum(axis=0)[1] == 2


def test_the_order_of_the_rows_does_not_matter(task):
    given, scores = rows([0, 2, 1], [1, 0], [0, 0, 0, 3]), np.random.default_rng(0).normal(size=(9, 1))
    shuffled = np.random.default_rng(1).permutation(9)
    again = metric(task, scores[shuffled], [given[i] for i in shuffled])
    assert again == pytest.approx(metric(task, scores, given))


def test_queries_that_can_not_be_judged_are_left_out_of_the_metric(task):
    given, scores = rows([1, 0], [0, 0], [2]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])[:, None]
    assert metric(task, scores, given) == 1.0
    same, remark = TextRanking.unified(given)
    assert same is given
    assert remark == (
        "left out of the metric: 1 query with one passage only, such as 'query 2'; "
        "1 query with no relevant passage, such as 'query 1'"
    )


def test_the_interval_is_over_queries_not_over_rows(task):
    scores = np.tile([2.0, 1.0], 40)[:, None]
    value, (low, high) = metric_interval(task, scores, rows(*[[1, 0]] * 30, *[[0, 1]] * 10))
    right = np.r_[np.ones(30), np.full(10, 1 / np.log2(3))]
    half = 1.96 * right.std() / np.sqrt(40)
    assert value == pytest.approx(right.mean())
    assert (low, high) == (pytest.approx(value - half, abs=0.01), pytest.approx(value + half, abs=0.01))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (rows([1, 1], [1, 1]), "all labels are 1, so no passage is better. Is --label the right column?"),
        (rows([1], [0], [2]), "no query can be judged: there are 3 queries with one passage only"),
    ],
)
def test_labels_that_rank_nothing_are_refused(given, problem):
    with pytest.raises(DataError) as error:
        TextRanking.unified(given)
    assert problem in str(error.value)


def test_rows_without_labels_are_fine():
    given = rows([None, None], [None])
    assert TextRanking.unified(given) == (given, "")


@pytest.mark.parametrize(
    ("gains", "label", "is_sign"),
    [(10, 1, True), (10, 0.5, True), (3, 1, False), (10, "entailment", False), (10, -1, False), (10, None, False)],
)
def test_many_numbered_passages_a_query_are_a_sign(gains, label, is_sign):
    given = [row | {"label": label} for row in rows([1] * gains, [1] * gains)]
    assert bool(TextRanking.signs(given)) == is_sign


def test_a_single_text_is_refused(task):
    with pytest.raises(DataError, match=r"not a query and a passage. Give pairs"):
        task.row("a query")
    assert TextRanking.check({"text": "a", "text_pair": None, "label": "1"}, 100) == "text_pair is empty"
    assert TextRanking.canonical({"text": "a", "text_pair": "b", "label": "good"}) == "label 'good' is no number"


def test_a_label_has_the_number_of_its_query(task):
    found = task.label_array([*rows([1, None]), *rows([3], [0])])
    assert found.tolist() == [[1, 0], [pytest.approx(np.nan, nan_ok=True), 0], [3, 0], [0, 1]]


def test_scores_that_order_pairs_at_random_are_chance(task):
    given = rows(*[[1, 0, 0, 2, 0]] * 60)
    gains = np.array([float(row["label"]) for row in given])
    random = np.random.default_rng(0).normal(size=len(given))
    assert task.is_chance(random[:, None], given)
    assert not task.is_chance((gains + random)[:, None], given)
    assert not task.is_chance(random[:10, None], given[:10])  # too few to tell
