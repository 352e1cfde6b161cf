"""What labelled rows, and other orders of the options, say about a teacher's answers."""

import numpy as np
import pytest

from kdexport.asking import trust
from kdexport.tasks.classes import Classes
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.judging import near_chance
from kdexport.tasks.metrics import softmax
from kdexport.tasks.several import SeveralLabels

LABELS = ["billing", "invoices", "weather", "sport"]


def task_of(kind, function):
    class Task(kind):
        def __init__(self):
            self.labels = LABELS
            self.config = TaskConfig(task="", labels=LABELS, function=function, max_length=8, inputs=[])

    return Task()


ONE = task_of(Classes, "softmax")
SEVERAL = task_of(SeveralLabels, "sigmoid")


def drawn(n, seed=0):
    """Labels, drawn by the probabilities of the logits that come with them."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (n, 4))
    labels = np.array([draw.choice(4, p=p) for p in softmax(logits)])
    return logits, labels


def rows_of(labels):
    return [{"label": LABELS[i]} for i in labels]


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_a_teacher_that_is_too_sure_or_too_shy_gets_its_temperature(true):
    logits, labels = drawn(3_000)
    assert trust.fitted_temperature(logits * true, labels) == pytest.approx(true, rel=0.1)


def test_the_temperature_of_several_labels():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (2_000, 4))
    labels = (draw.random((2_000, 4)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    assert trust.fitted_temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    before, after = trust.calibration(3 * logits, labels)
    assert after < before / 2


def test_a_few_right_answers_do_not_make_a_teacher_certain():
    logits = 2 * np.eye(4)[np.arange(12) % 4]
    scaled = logits / trust.fitted_temperature(logits, np.arange(12) % 4)
    assert 0.9 < softmax(scaled).max() < 0.99


def test_calibration_is_measured_on_rows_that_did_not_fit_it():
    logits, labels = drawn(3_000)
    before, after = trust.calibration(5 * logits, labels)
    assert before > 0.15
    assert after < 0.05
    noise = np.random.default_rng(1).integers(0, 4, 40)
    assert trust.calibration(logits[:1], labels[:1])[0] >= 0
    assert all(np.isfinite(trust.calibration(logits[:40], noise)))


def test_accuracy_has_an_interval():
    logits, labels = drawn(500)
    found = trust.accuracy(ONE, logits, rows_of(labels))
    assert found.n == 500
    assert found.ci95[0] < found.value < found.ci95[1]


def test_answers_that_change_with_the_order_are_counted():
    logits, _ = drawn(200)
    other = logits.copy()
    other[:50] = -other[:50]
    found = trust.order_agreement(ONE, logits, other)
    assert found.value == 0.75
    assert found.ci95[0] < 0.75 < found.ci95[1]


def test_an_option_that_is_taken_for_its_place_is_named():
    draw = np.random.default_rng(0)
    fair = draw.integers(0, 4, 200)
    assert trust.position_bias(fair, 4) == ""
    biased = np.where(draw.random(200) < 0.4, 0, fair)
    assert trust.position_bias(biased, 4).startswith("Option 1 of 4 is taken in ")
    assert trust.position_bias(np.zeros(5, int), 4) == ""
    many = np.where(draw.random(200) < 0.4, 0, draw.integers(0, 150, 200))
    assert trust.position_bias(many, 150).startswith("Options 1 to ")
    assert trust.position_bias(draw.integers(0, 150, 200), 150) == ""


def test_labels_that_may_mean_the_same_are_named():
    logits = np.full((60, 4), -4.0)
    logits[np.arange(60), np.arange(60) % 4] = 3.0
    split = [i for i in range(60) if i % 4 == 0]
    logits[split, 1] = 2.8
    assert [(one.first, one.second, one.rows) for one in trust.alike(ONE, logits)] == [("billing", "invoices", 15)]
    logits[split, 1] = -4.0
    assert trust.alike(ONE, logits) == []
    other = logits.copy()
    other[split, 1] = 5.0
    assert [one.rows for one in trust.alike(ONE, logits, other)] == [15]
    assert trust.alike(SEVERAL, logits) == []


def test_chance_is_no_matter_of_accuracy_alone():
    labels = np.zeros(100, int)
    labels[:10] = 1
    always = np.tile([3.0, 0, 0, 0], (100, 1))
    assert near_chance(ONE, always, rows_of(labels))
    assert not near_chance(ONE, 3 * np.eye(4)[labels], rows_of(labels))


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"right": 0.2, "right_by_words": 0.7, "mass": 0.1}, "teacher.ask.by: words"),
        ({"mass": 0.1, "right": 0.2, "right_by_words": 0.2}, "10% of its probability"),
        ({"mass": 0.9}, "answers 'billing' to 100%"),
    ],
)
def test_the_likely_cause_of_answers_near_chance(known, words):
    assert words in trust.cause(ONE, np.tile([3.0, 0, 0, 0], (40, 1)), **known)


def test_the_order_or_the_names_are_the_cause_where_nothing_else_is():
    logits, _ = drawn(100)
    assert "teacher.ask.orders" in trust.cause(ONE, logits, mass=0.9, same_in_another_order=0.3)
    assert "data.labels" in trust.cause(ONE, logits, mass=0.9, same_in_another_order=0.9)
