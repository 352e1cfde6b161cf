"""What must hold for any predictions: other libraries' values, bounds, and sums over parts that are those of the whole.

Every metric is a function of sums over rows (`stats`, `value`); bootstraps and several processes rest on that.
"""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special
from scipy.stats import binomtest, pearsonr, rankdata
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from sklearn.metrics import (
    confusion_matrix as sklearns_confusion,
)
from tokenizers import Tokenizer

from kdexport.data import demo
from kdexport.tasks import judging
from kdexport.tasks.causal_lm import CausalLM
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.metrics import (
    Metric,
    best_threshold,
    cohen_kappa,
    confusion_matrix,
    f1_of,
    log_softmax,
    mcnemar_p,
    mid_ranks,
    paired_difference,
    reliability,
    roc_auc,
    sigmoid,
    softmax,
    wilson_interval,
)
from kdexport.tasks.several import BETWEEN
from kdexport.tasks.text_classification import MultiLabelTexts, TextClassification, TextRegression
from kdexport.tasks.token_classification import PlainTags, TokenClassification
from kdexport.tasks.transcripts import Transcripts

NUMBERS = st.floats(-30, 30, width=32)
TIED = st.sampled_from([-1.5, 0.0, 0.25, 0.5, 3.0])


def numbers(*shape, of=NUMBERS):
    return arrays(np.float64, shape, elements=of)


@st.composite
def right_rows(draw):
    n = draw(st.integers(1, 40))
    return [np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for _ in range(2)]


# --- against other libraries


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.sampled_from([1.0, 1e3]))
def test_probabilities_are_scipys(data, rows, classes, scale):
    logits = data.draw(numbers(rows, classes)) * scale
    assert np.allclose(softmax(logits), special.softmax(logits, axis=1), rtol=1e-9, atol=1e-300)
    assert np.allclose(log_softmax(logits), special.log_softmax(logits, axis=1), rtol=1e-9, atol=1e-9)
    assert np.allclose(sigmoid(logits), special.expit(logits), rtol=1e-9, atol=1e-300)


@given(st.integers(1, 2000), st.data())
def test_wilsons_interval_is_scipys(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = wilson_interval(hits, n)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= hits / n + 1e-12
    assert hits / n - 1e-12 <= high <= 1
    other = wilson_interval(n - hits, n)
    assert other == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(right_rows())
def test_mcnemar_is_the_sign_test(sides):
    a, b = sides
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_p(a, b) == pytest.approx(expected, rel=1e-9) == mcnemar_p(b, a)


@given(right_rows())
def test_a_paired_difference_turns_round_with_its_sides_and_lies_in_its_interval(sides):
    a, b = sides
    value, (low, high) = paired_difference(a, b)
    assert value == pytest.approx(b.mean() - a.mean())
    assert -1 <= low <= value <= high <= 1
    back, (lower, higher) = paired_difference(b, a)
    assert (back, lower, higher) == pytest.approx((-value, -high, -low))


@st.composite
def chosen(draw):
    n, classes = draw(st.integers(1, 30)), draw(st.integers(2, 5))
    of = arrays(np.int64, n, elements=st.integers(0, classes - 1))
    return draw(of), draw(of), classes


@given(chosen())
def test_counts_by_class_are_sklearns(found):
    labels, answers, classes = found
    counts = confusion_matrix(labels, answers, classes)
    assert (counts == sklearns_confusion(labels, answers, labels=range(classes))).all()
    assert -1 - 1e-9 <= cohen_kappa(counts) <= 1 + 1e-9
    if len({*labels, *answers}) > 1:
        assert cohen_kappa(counts) == pytest.approx(cohen_kappa_score(labels, answers), abs=1e-9)


@given(st.data(), st.integers(1, 20), st.integers(1, 4))
def test_f1_is_sklearns(data, rows, classes):
    ours, theirs = (data.draw(arrays(bool, (rows, classes))) for _ in range(2))
    sums = np.array([(ours & theirs).sum(), ours.sum(), theirs.sum()], float)
    expected = f1_score(theirs.ravel(), ours.ravel(), zero_division=1.0)
    assert float(f1_of(sums)) == pytest.approx(expected)


@given(st.data(), st.integers(1, 25), st.integers(1, 25), st.sampled_from([NUMBERS, TIED]))
def test_areas_thresholds_and_ranks_are_those_of_sklearn_and_scipy(data, m, n, of):
    positives, negatives = data.draw(numbers(m, of=of)), data.draw(numbers(n, of=of))
    scores, truth = np.concatenate([positives, negatives]), np.repeat([1, 0], [m, n])
    assert (mid_ranks(scores) == rankdata(scores)).all()
    area, (low, high) = roc_auc(positives, negatives)
    assert area == pytest.approx(roc_auc_score(truth, scores))
    assert 0 <= low <= area + 1e-12
    assert area - 1e-12 <= high <= 1
    assert roc_auc(negatives, positives)[0] == pytest.approx(1 - area)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert best_threshold(positives, negatives)[0] == pytest.approx((tpr - fpr).max())


@given(st.data(), st.integers(1, 30), st.integers(2, 4), st.integers(1, 12))
def test_calibration_error_counts_each_row_once_and_stays_between_0_and_1(data, rows, classes, bins):
    probabilities = softmax(data.draw(numbers(rows, classes)))
    labels = data.draw(arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    error, table = reliability(probabilities, labels, bins)
    assert 0 <= error <= 1
    assert sum(n for *_, n in table) == rows
    assert [confidence for confidence, *_ in table] == sorted(confidence for confidence, *_ in table)
    right = (probabilities.argmax(axis=1) == labels).mean()
    assert sum(n * accuracy for _, accuracy, n in table) / rows == pytest.approx(right)
    assert error >= abs(right - probabilities.max(axis=1).mean()) - 1e-9


@given(st.booleans(), st.floats(0.01, 10), st.floats(0.01, 10))
def test_gain_and_retention_say_the_same_whichever_way_is_better(higher, before, after):
    metric = Metric("m", higher)
    assert metric.gain(before, after) == -metric.gain(after, before)
    assert (metric.retention(after, before) > 1) == (metric.gain(before, after) > 0) or after == pytest.approx(before)
    assert metric.retention(after, before) * metric.retention(before, after) == pytest.approx(1)


def test_what_metrics_are_where_there_is_nothing_to_count():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert mcnemar_p(np.array([True]), np.array([True])) == 1.0
    assert cohen_kappa(np.zeros((2, 2), int)) == 0.0
    assert cohen_kappa(np.array([[5, 0], [0, 0]])) == 0.0
    assert f1_of(np.zeros(3)) == 1.0
    assert Metric("m").retention(0.5, 0.0) == 0.0
    assert best_threshold(np.ones(1), np.ones(1)) == (0.0, 1.0)


def test_a_paired_difference_by_hand():
    """Agresti and Min 2005: half a row more in each cell."""
    a = np.array([True] + [False] * 3 + [True] * 6)
    b = np.array([False] + [True] * 3 + [True] * 6)
    half = 1.959964 * np.sqrt(5 - 4 / 12) / 12
    assert paired_difference(a, b) == (pytest.approx(0.2), pytest.approx((2 / 12 - half, 2 / 12 + half)))


def test_calibration_has_ten_bins_of_equal_width_unless_others_are_asked_for():
    confidence = np.array([0.5, 0.59, 0.61, 0.7, 0.95, 1.0])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    _, table = reliability(probabilities, np.zeros(6, int))
    assert [n for *_, n in table] == [2, 1, 1, 2]  # 0.5 to 0.6, to 0.7, to 0.8, and from 0.9
    assert [n for *_, n in reliability(probabilities, np.zeros(6, int), 2)[1]] == [6]


def test_metrics_are_shown_in_percent_but_for_numbers():
    assert Metric("m").text(0.12345) == "12.35%"
    assert Metric("m", kind="number").text(0.12345) == "0.123"


# --- tasks: rows, their logits, and what their metric is by definition


class Heard(Transcripts):
    """Logits are the numbers of the words that were heard."""

    def texts(self, logits):
        return [" ".join("abcd"[int(i)] for i in row if i >= 0) for row in logits]


TOKENIZER = Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))
LABELS = ["a", "b", "c"]
BIO = ["O", "B-x", "I-x", "B-y", "I-y"]
PLAIN = ["DET", "NOUN", "VERB"]
WORDS = 4


def task_of(kind, name, labels, **more):
    return kind(TaskConfig(task=name, labels=labels, inputs=["input_ids", "attention_mask"], **more), TOKENIZER)


TASKS = {
    "classes": lambda: task_of(TextClassification, "text-classification", LABELS),
    "several": lambda: task_of(MultiLabelTexts, "text-classification", LABELS, function="sigmoid"),
    "number": lambda: task_of(TextRegression, "text-classification", ["value"], function="none"),
    "tags": lambda: task_of(TokenClassification, "token-classification", BIO, max_length=WORDS),
    "plain tags": lambda: task_of(PlainTags, "token-classification", PLAIN, max_length=WORDS),
    "next token": lambda: task_of(CausalLM, "causal-lm", [], max_length=8, kept=2),
    "transcripts": Heard,
}


@st.composite
def judged(draw, kind, least=1):
    """A task, logits and labelled rows."""
    task, n = TASKS[kind](), draw(st.integers(least, 8))
    each = [draw(one_row(kind)) for _ in range(n)]
    return task, np.stack([logits for logits, _ in each]).astype(np.float32), [row for _, row in each]


@st.composite
def one_row(draw, kind):
    if kind == "classes":
        return draw(numbers(3)), {"label": draw(st.sampled_from(LABELS))}
    if kind == "several":
        return draw(numbers(3)), {"label": BETWEEN.join(sorted(draw(st.sets(st.sampled_from(LABELS)))))}
    if kind == "number":
        return draw(numbers(1)), {"label": f"{draw(NUMBERS):g}"}
    if kind in ("tags", "plain tags"):
        labels = BIO if kind == "tags" else PLAIN
        tags = draw(st.lists(st.sampled_from(labels), min_size=1, max_size=WORDS + 1))
        logits = np.zeros((WORDS, len(labels)))
        read = min(draw(st.integers(0, len(tags))), WORDS)
        logits[:read] = draw(numbers(read, len(labels), of=st.floats(0.5, 9)))
        return logits, {"text": " ".join("w" for _ in tags), "label": " ".join(tags)}
    if kind == "transcripts":
        truth = draw(st.lists(st.sampled_from("abcd"), max_size=4))
        heard = draw(st.lists(st.integers(0, 3), max_size=4))
        return np.array(heard + [-1] * (4 - len(heard))), {"label": " ".join(truth)}
    text = draw(st.sampled_from(["", "one", "one two", "two words or more, and more than are read"]))
    logits = draw(numbers(8, 5))
    logits[:, [0, 2, 4]] = -np.abs(logits[:, [0, 2, 4]])
    return logits, {"text": text, "label": ""}


@pytest.mark.parametrize("kind", TASKS)
@given(data=st.data())
def test_sums_over_parts_of_the_rows_are_those_of_the_whole(kind, data):
    task, logits, rows = data.draw(judged(kind))
    whole = task.stats(logits, rows)
    assert whole.shape[0] == len(rows)
    assert whole.dtype == np.float64
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    bounds = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    parts = [task.stats(logits[a:b], rows[a:b]) for a, b in bounds]
    assert (np.concatenate(parts) == whole).all()
    assert float(task.value(sum(part.sum(axis=0) for part in parts))) == pytest.approx(
        judging.metric(task, logits, rows)
    )


@pytest.mark.parametrize("kind", TASKS)
@given(data=st.data())
def test_the_order_of_rows_is_nothing_to_a_metric(kind, data):
    task, logits, rows = data.draw(judged(kind))
    order = data.draw(st.permutations(range(len(rows))))
    moved = judging.metric(TASKS[kind](), logits[order], [rows[i] for i in order])
    if kind == "number" and logits.std() < 0.01:  # what is left of differences of large numbers
        return
    assert moved == pytest.approx(judging.metric(task, logits, rows), abs=1e-6)


@pytest.mark.parametrize("kind", TASKS)
@given(data=st.data())
def test_metrics_and_their_intervals_are_numbers_within_their_bounds(kind, data):
    task, logits, rows = data.draw(judged(kind))
    value, (low, high) = judging.metric_interval(task, logits, rows)
    assert low <= high
    least = -1.0 if kind == "number" else 0.0
    for each in (value, low, high):
        assert each >= least - 1e-6
        assert each <= 1 + 1e-6 or kind in ("next token", "transcripts")
    difference, (lower, higher) = judging.difference(task, logits, logits, rows)
    assert difference == 0.0
    assert lower <= 0.0 <= higher
    assert all(np.isfinite(further) for further in task.further(logits, rows).values())
    assert ((wrong := judging.wrong_rows(task, logits, rows)) is None) == (task.correct(logits, rows) is None)
    assert wrong is None or all(0 <= i < len(rows) for i in wrong)


@given(st.data())
def test_values_are_those_of_sklearn_and_scipy(data):
    task, logits, rows = data.draw(judged("classes"))
    answers = [LABELS[i] for i in logits.argmax(axis=1)]
    labels = [row["label"] for row in rows]
    assert judging.metric(task, logits, rows) == pytest.approx(accuracy_score(labels, answers))
    there = sorted({*labels})
    expected = f1_score(labels, answers, average="macro", labels=there, zero_division=0.0)
    assert task.further(logits, rows)["macro F1"] == pytest.approx(expected)


@given(st.data())
def test_correlation_is_scipys(data):
    task, logits, rows = data.draw(judged("number", least=2))
    x, y = logits[:, 0].astype(float), task.label_array(rows)[:, 0].astype(float)
    assume(x.std() > 1e-2 and y.std() > 1e-2)
    assert judging.metric(task, logits, rows) == pytest.approx(float(pearsonr(x, y).statistic), abs=1e-6)
