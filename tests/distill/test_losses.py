"""Losses of logits: against values computed by hand in numpy, and against the formulas that their authors publish."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdexport.distill.losses import (
    LOGIT_LOSSES,
    bce,
    cross_entropy,
    dist,
    dkd,
    kl,
    mse,
    objective,
    soft_cross_entropy,
    total,
    value_at,
)
from kdexport.spec import Schedule
from kdexport.spec.sections import LossName
from kdexport.tasks.config import NO_LABEL
from kdexport.tasks.menus import OF_LAYERS
from kdexport.tasks.transcripts import NEVER

TEACHER = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
STUDENT = torch.tensor([[0.0, 0.0], [1.0, 0.0]])


# That of paths along time has tests of its own: tests/tasks/test_speech.py; so have those of queries: test_rankings.py.
OTHERS = ("ctc", "margin-mse", "listwise-kl", "cosine", "similarity")  # of steps, of rankings, of vectors
OF_ROWS = {name: loss for name, loss in LOGIT_LOSSES.items() if name not in OTHERS}


def logits(rows=16, classes=7, seed=0, scale=2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's, teacher's, and labels."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, classes, generator=random) * scale for _ in range(2))
    return student, teacher, torch.randint(classes, (rows,), generator=random)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def both(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    return softmax(student.double().numpy() / temperature), softmax(teacher.double().numpy() / temperature)


# --- each loss by hand


def test_kl_is_the_value_computed_by_hand():
    # T = 2. Row 1: teacher softmax([1, 0]) = (e, 1) / (1 + e), student (1/2, 1/2).
    p = math.e / (1 + math.e)
    first = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    # Row 2: teacher softmax([0, .5]), student softmax([.5, 0]): mirror images, log ratio ∓ 0.5.
    q = 1 / (1 + math.exp(0.5))
    second = q * -0.5 + (1 - q) * 0.5
    assert kl(STUDENT, TEACHER, None, 2.0).item() == pytest.approx(4 * (first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_agrees_with_torch(temperature):
    student, teacher, _ = logits()
    expected = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    )
    assert torch.allclose(kl(student, teacher, None, temperature), temperature**2 * expected, rtol=1e-5)


def test_kl_of_equal_logits_is_zero_whatever_constant_is_added():
    assert kl(TEACHER + 5.0, TEACHER, None, 3.0).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_by_hand_is_kl_plus_the_teachers_entropy(temperature):
    student, teacher, _ = logits()
    p, q = both(student, teacher, temperature)
    expected = -(temperature**2) * (q * np.log(p)).sum(axis=1).mean()
    found = soft_cross_entropy(student, teacher, None, temperature).item()
    assert found == pytest.approx(expected, rel=1e-5)
    entropy = -(temperature**2) * (q * np.log(q)).sum(axis=1).mean()
    assert found == pytest.approx(kl(student, teacher, None, temperature).item() + entropy, rel=1e-5)


def test_mse_is_the_mean_over_rows_and_classes_of_logits_as_they_are():
    assert mse(STUDENT, TEACHER, None, 7.0).item() == pytest.approx((4 + 0 + 1 + 1) / 4)
    assert mse(STUDENT + 1.0, TEACHER, None, 7.0).item() == pytest.approx((1 + 1 + 4 + 0) / 4)  # not centred


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_bce_takes_each_class_by_itself(temperature):
    student, teacher, _ = logits(5, 3)
    expected = []
    for s, t in zip(student.double().flatten().tolist(), teacher.double().flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-x / temperature)) for x in (s, t))
        expected.append(-(q * math.log(p) + (1 - q) * math.log(1 - p)))
    found = bce(student, teacher, None, temperature).item()
    assert found == pytest.approx(temperature**2 * np.mean(expected), rel=1e-5)


def test_dkd_by_hand():
    student, teacher, labels = logits(3, 4, seed=1)
    p, q = both(student, teacher, 2.0)
    expected = []
    for row, target in enumerate(labels.tolist()):
        others = [c for c in range(4) if c != target]
        tckd = q[row, target] * np.log(q[row, target] / p[row, target])
        tckd += (1 - q[row, target]) * np.log((1 - q[row, target]) / (1 - p[row, target]))
        p_others, q_others = (x[row, others] / x[row, others].sum() for x in (p, q))
        expected.append(tckd + 8 * (q_others * np.log(q_others / p_others)).sum())
    assert dkd(student, teacher, labels, 2.0).item() == pytest.approx(4 * np.mean(expected), rel=1e-5)


def test_dkd_is_the_formula_of_its_authors():
    """As megvii-research/mdistiller computes it: masks, probabilities summed, the target's logit lowered by 1000."""
    student, teacher, labels = logits()
    temperature, alpha, beta = 4.0, 1.0, 8.0
    target = F.one_hot(labels, 7).bool()

    def two(x):
        probabilities = (x / temperature).softmax(1)
        return torch.stack([(probabilities * target).sum(1), (probabilities * ~target).sum(1)], dim=1)

    tckd = F.kl_div(two(student).log(), two(teacher), reduction="sum")
    without = [(x / temperature - 1000.0 * target).log_softmax(1) for x in (student, teacher)]
    nckd = F.kl_div(without[0], without[1].exp(), reduction="sum")
    expected = (alpha * tckd + beta * nckd) * temperature**2 / len(labels)
    assert torch.allclose(dkd(student, teacher, labels, temperature), expected, rtol=1e-5)


def test_dkd_with_the_teachers_own_weight_is_kl(monkeypatch):
    student, teacher, labels = logits(1)
    target = (teacher / 2).softmax(1)[0, labels[0]].item()
    monkeypatch.setattr("kdexport.distill.losses._NCKD_WEIGHT", 1 - target)
    found = dkd(student, teacher, labels, 2.0)
    assert torch.allclose(found, kl(student, teacher, None, 2.0), rtol=1e-5)


def test_dkd_takes_the_teachers_choice_where_there_is_no_label():
    student, teacher, labels = logits()
    choice = teacher.argmax(1)
    assert torch.allclose(dkd(student, teacher, None, 2.0), dkd(student, teacher, choice, 2.0))
    some = labels.clone()
    some[::2] = NO_LABEL
    mixed = torch.where(some == NO_LABEL, choice, labels)
    assert torch.allclose(dkd(student, teacher, some, 2.0), dkd(student, teacher, mixed, 2.0))
    assert not torch.allclose(dkd(student, teacher, some, 2.0), dkd(student, teacher, labels, 2.0), rtol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_less_the_correlation_of_rows_and_of_columns(temperature):
    student, teacher, _ = logits(6, 4)
    p, q = both(student, teacher, temperature)
    rows = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    columns = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(4)])
    found = dist(student, teacher, None, temperature)
    assert found.item() == pytest.approx(temperature**2 * (rows + columns), rel=1e-4)
    alone = dist(student[:1], teacher[:1], None, temperature)  # a single row has no columns
    assert alone.item() == pytest.approx(temperature**2 * (1 - np.corrcoef(p[0], q[0])[0, 1]), rel=1e-4)


# --- all of them


def test_every_loss_of_the_spec_is_one_of_logits_or_of_layers():
    assert set(get_args(LossName)) == set(LOGIT_LOSSES) | set(OF_LAYERS)


@pytest.mark.parametrize("name", OF_ROWS)
def test_following_a_loss_brings_the_student_to_the_teacher(name):
    student, teacher, labels = logits(64, 5)
    student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        LOGIT_LOSSES[name](student, teacher, labels, 2.0).backward()
        optimizer.step()
    assert (student.argmax(1) == teacher.argmax(1)).float().mean() > 0.95


@pytest.mark.parametrize("name", sorted(OF_ROWS.keys() - {"mse"}))
def test_t_squared_keeps_the_gradient_when_the_temperature_rises(name):
    def gradient(temperature):
        student, teacher, labels = logits(64, 5, scale=0.1)
        student.requires_grad_()
        LOGIT_LOSSES[name](student, teacher, labels, temperature).backward()
        return student.grad.norm().item()

    if name == "dist":  # a correlation has no scale: its gradient grows as the probabilities draw together
        assert gradient(20.0) / gradient(5.0) == pytest.approx(16.0, rel=0.05)
    else:
        assert gradient(20.0) == pytest.approx(gradient(5.0), rel=0.05)


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("rows", [1, 4])
def test_extreme_logits_stay_finite(name, size, rows):
    if name == "mse" and size > 1e18:
        pytest.skip("a square that no float32 holds")
    student = torch.tensor([[size, -size, 0.0]]).repeat(rows, 1).requires_grad_()
    teacher = torch.tensor([[-size, size, 0.0]]).repeat(rows, 1)
    loss = LOGIT_LOSSES[name](student, teacher, None, 1.0)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_student_that_says_nothing_yet_has_a_finite_gradient(name):
    _, teacher, labels = logits(8, 2)
    student = torch.zeros(8, 2, requires_grad=True)
    LOGIT_LOSSES[name](student, teacher, labels, 2.0).backward()
    assert torch.isfinite(student.grad).all()


# --- the labels' term, and the sum


def test_rows_without_a_label_do_not_change_the_weight_of_those_with_one():
    student, _, labels = logits(8, 3)
    own = F.cross_entropy(student, labels, reduction="none")
    labels[5:] = NO_LABEL
    assert torch.allclose(cross_entropy(student, labels), own[:5].sum() / 8)


def test_a_batch_without_labels_gives_zero():
    student, _, labels = logits(8, 3)
    student.requires_grad_()
    loss = cross_entropy(student, torch.full_like(labels, NO_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_alpha_weighs_the_teachers_terms_against_the_labels():
    student, teacher, labels = logits(8, 3)
    soft = 1.5 * kl(student, teacher, None, 2.0) + 0.2 * mse(student, teacher, None, 2.0)
    hard = F.cross_entropy(student, labels)
    for alpha in (0.0, 0.25, 0.9, 1.0):
        terms = objective(student, labels, teacher, {"kl": 1.5, "mse": 0.2}, temperature=2.0, alpha=alpha)
        assert torch.allclose(total(terms), alpha * soft + (1 - alpha) * hard)
    assert [term.name for term in terms] == ["kl", "mse"]  # alpha 1: no labels
    without = objective(student, labels, None, {"kl": 1.0}, temperature=2.0, alpha=0.9)
    assert [(term.name, term.weight) for term in without] == [("ce", 1.0)]
    assert torch.allclose(total(without), hard)


def test_losses_of_layers_are_left_to_the_caller():
    student, teacher, labels = logits(8, 3)
    terms = objective(student, labels, teacher, {"hidden": 1.0, "kl": 1.0}, temperature=1.0, alpha=0.5)
    assert [term.name for term in terms] == ["kl", "ce"]


def test_a_schedule_is_a_straight_line():
    assert [value_at(Schedule(start=4.0, end=1.0), x) for x in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]
    assert value_at(0.3, 0.7) == 0.3


def test_frames_are_compared_where_the_recording_has_them():
    """Of two recordings, one of 3 of 5 steps, and a text that stands for what is heard, only real steps count."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
    blanks = torch.tensor([0.0, NEVER, NEVER, NEVER])
    teacher[1, 3:] = blanks
    teacher[2] = blanks.roll(1)
    labels = torch.tensor([[1, 2], [3, -1], [1, -1]])
    given = {"labels": labels, "temperature": 1.0, "hard": "ctc"}
    (found, of_labels) = objective(student, teacher_logits=teacher, losses={"kl": 1.0}, alpha=0.5, **given)
    real = [(0, t) for t in range(5)] + [(1, t) for t in range(3)]
    logs = [(teacher[i, t].log_softmax(0), student[i, t].log_softmax(0)) for i, t in real]
    expected = sum((his.exp() * (his - mine)).sum() for his, mine in logs) / len(real)
    assert found.size.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found.name, of_labels.name) == ("kl", "ctc")
    (nothing,) = objective(student, teacher_logits=teacher[2:].repeat(3, 1, 1), losses={"kl": 1.0}, alpha=1.0, **given)
    assert nothing.size.item() == 0
