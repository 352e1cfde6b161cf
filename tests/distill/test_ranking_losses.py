"""Losses of the passages of a query, against loops over the queries; and the order that brings them into one batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdexport.distill.losses import LABEL_LOSSES, LOGIT_LOSSES, objective
from kdexport.distill.order import ByLength

QUERIES = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
GAINS = torch.tensor([2.0, 0.0, 0.0, 1.0, 0.0, 1.0])
LABELS = torch.stack([GAINS, QUERIES], dim=1)
STUDENT = torch.tensor([0.3, 1.0, -2.0, 0.5, 0.1, 1.5])[:, None]
TEACHER = torch.tensor([2.0, 0.2, -1.0, 3.0, 0.4, 0.9])[:, None]


def of_queries():
    """The student's and the teacher's scores of each query, and its gains."""
    for query in range(3):
        own = query == QUERIES
        yield STUDENT[own, 0], TEACHER[own, 0], GAINS[own]


def test_margin_mse_compares_the_differences_of_each_pair_of_a_query():
    off = [
        ((s[i] - s[j]) - (t[i] - t[j])).square() for s, t, _ in of_queries() for i in range(len(s)) for j in range(i)
    ]
    assert len(off) == 4
    assert LOGIT_LOSSES["margin-mse"](STUDENT, TEACHER, LABELS, 1.0).item() == pytest.approx(np.mean(off))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_listwise_kl_is_the_mean_over_queries(temperature):
    each = [
        F.kl_div(F.log_softmax(s / temperature, 0), F.softmax(t / temperature, 0), reduction="sum")
        for s, t, _ in of_queries()
    ]
    found = LOGIT_LOSSES["listwise-kl"](STUDENT, TEACHER, LABELS, temperature).item()
    assert found == pytest.approx(temperature**2 * np.mean(each), rel=1e-5)


def test_the_label_loss_is_a_cross_entropy_with_the_gains():
    each = [-(g / g.sum().clamp(min=1e-9) * F.log_softmax(s, 0)).sum() for s, _, g in of_queries()]
    assert LABEL_LOSSES["listwise"](STUDENT, LABELS).item() == pytest.approx(np.mean(each), rel=1e-5)


def test_a_row_without_a_gain_is_no_passage_to_the_label_loss():
    labels = LABELS.clone()
    labels[2, 0] = torch.nan
    kept = [0, 1, 3, 4, 5]
    found = LABEL_LOSSES["listwise"](STUDENT, labels)
    assert found.item() == pytest.approx(LABEL_LOSSES["listwise"](STUDENT[kept], labels[kept]).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["margin-mse", "listwise-kl"])
def test_only_differences_within_a_query_count(name):
    shifted = STUDENT + 5 * QUERIES[:, None]
    found = [LOGIT_LOSSES[name](student, TEACHER, LABELS, 2.0).item() for student in (STUDENT, shifted)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert LOGIT_LOSSES[name](TEACHER + QUERIES[:, None], TEACHER, LABELS, 2.0).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["margin-mse", "listwise-kl", "mse"])
def test_batches_in_which_nothing_can_be_compared_have_finite_gradients(name):
    alone = torch.stack([torch.full((6,), torch.nan), torch.arange(6.0)], dim=1)
    student = STUDENT.clone().requires_grad_()
    terms = objective(student, alone, TEACHER, {name: 1.0}, temperature=1.0, alpha=0.5, hard="listwise")
    torch.stack([term.weight * term.size for term in terms]).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_extreme_scores_stay_finite():
    student = (STUDENT * 1e4).requires_grad_()
    LOGIT_LOSSES["listwise-kl"](student, -TEACHER * 1e4, LABELS, 1.0).backward()
    assert torch.isfinite(student.grad).all()


def test_a_batch_holds_several_passages_of_each_of_its_queries():
    draw = np.random.default_rng(0)
    groups, lengths = draw.permutation(np.repeat(np.arange(50), 30)), draw.integers(5, 90, 1500)
    order = ByLength(lengths, 32, seed=0, groups=groups)
    seen = list(order)
    assert sorted(seen) == list(range(1500))
    counts = [np.unique(groups[seen[i : i + 32]], return_counts=True)[1] for i in range(0, 1500, 32)]
    assert np.concatenate(counts).mean() > 5
    assert np.mean([len(count) for count in counts]) >= 4
    order.set_epoch(1)
    assert list(order) != seen
