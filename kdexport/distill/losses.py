"""Losses as pure functions of logits; torch only.

What a student is trained on is a sum of terms, each with its weight:

    alpha · Σ wᵢ · Lᵢ(student, teacher)  +  (1 − alpha) · CE(student, labels)

Hinton, Vinyals and Dean 2015 (https://arxiv.org/abs/1503.02531, section 2) with KL as the only L. `alpha` is λ in
many textbooks: the share of the teacher's word against the labels'. Losses of probabilities softened by T have
gradients that shrink like 1/T²; each of them is multiplied by T², so that T changes what is learned and alpha and
the weights alone how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdexport.spec import Schedule
from kdexport.tasks.packed import drawn_of

# The label of a row that has none; the teacher alone teaches it.
UNLABELLED = -100

# student logits [B, C], teacher logits [B, C], labels int64 [B] or None, temperature → a scalar, the mean over rows.
LogitLoss = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


class Term(NamedTuple):
    """One part of the objective: it adds `weight · size` to what is optimised."""

    name: str
    weight: float
    size: Tensor


def objective(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    losses: Mapping[str, float],
    *,
    temperature: float,
    alpha: float,
    hard: str = "ce",
    packed: bool = False,
) -> list[Term]:
    """The terms above of one batch: the teacher's unless alpha is 0, the labels' unless it is 1.

    Args:
        student_logits: float [B, C].
        labels: int64 [B], `UNLABELLED` where a row has none.
        teacher_logits: float [B, C]; None leaves the labels' term alone, with its full weight.
        losses: weight of each of `LOGIT_LOSSES` that is wanted; other names are left to the caller.
        temperature: T of the teacher's terms.
        alpha: weight of the teacher's terms, from 0 to 1.
        hard: the labels' term, one of `LABEL_LOSSES`; other than `ce` takes labels float [B, C].
        packed: whether the teacher's are packed log probabilities of some classes, see `with_rest`.
    """
    label_loss = LABEL_LOSSES[hard]
    if teacher_logits is None:
        return [Term(hard, 1.0, label_loss(student_logits, labels))]
    student, teacher = student_logits.float(), teacher_logits.float()
    both = with_rest(student, teacher) if packed and alpha > 0 else (student, teacher)
    targets = None if packed else labels  # among the k outcomes they have other places
    terms = [
        Term(name, alpha * weight, LOGIT_LOSSES[name](*both, targets, temperature))
        for name, weight in losses.items()
        if name in LOGIT_LOSSES and alpha > 0
    ]
    # The teacher's term may have the same name, and is another.
    name = hard if hard not in losses else f"{hard} of labels"
    return terms if alpha == 1 else [*terms, Term(name, 1 - alpha, label_loss(student, labels))]


def value_at(value: float | Schedule, progress: float) -> float:
    """A setting at a point of training: itself, or where its straight line has come to.

    Args:
        value: a number or `{from, to}`.
        progress: 0 at the first step, 1 at the last.
    """
    if isinstance(value, Schedule):
        return value.start + (value.end - value.start) * progress
    return value


def total(terms: Sequence[Term]) -> Tensor:
    """What is optimised: the weighted sum, a scalar."""
    loss = terms[0].weight * terms[0].size
    for term in terms[1:]:
        loss = loss + term.weight * term.size
    return loss


# --- the labels' term


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labelled rows, summed and divided by all B rows.

    So a labelled row weighs the same whatever stands beside it in the batch, and a batch without a label gives 0.

    Args:
        student_logits: float [B, C].
        labels: int64 [B], `UNLABELLED` where a row has none.
    """
    return F.cross_entropy(student_logits, labels, ignore_index=UNLABELLED, reduction="sum") / len(labels)


def label_bce(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over classes, summed over the labelled rows and divided by all B rows.

    Args:
        student_logits: float [B, C].
        labels: 0 or 1, float [B, C]; NaN where a row has none.
    """
    known = ~labels.isnan().any(dim=1)
    each = F.binary_cross_entropy_with_logits(student_logits[known], labels[known].float(), reduction="none")
    return each.mean(dim=1).sum() / len(labels)


def label_mse(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Squared difference, summed over the labelled rows and divided by all B rows; see `label_bce`."""
    known = ~labels.isnan().any(dim=1)
    return (student_logits[known] - labels[known].float()).square().mean(dim=1).sum() / len(labels)


LABEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "bce": label_bce,
    "mse": label_mse,
}
# A task's objective → its labels' term.
OF_OBJECTIVE: dict[str, str] = {
    "classes": "ce",
    "tokens": "ce",
    "next-token": "ce",
    "several": "bce",
    "number": "mse",
}


# --- the teacher's terms


def kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · KL(teacher_T ‖ student_T): Hinton, Vinyals and Dean 2015, section 2.1.

    At least 0, and 0 only where both give the same probabilities.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * _divergence(teacher, student).mean()


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float
) -> Tensor:
    """−T² · Σ teacher_T · log student_T: `kl` plus the teacher's entropy, so the same gradients at another size."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.softmax(teacher_logits / temperature, dim=-1)
    return -(temperature**2) * (teacher * student).sum(dim=-1).mean()


def mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Mean squared difference of the logits, over rows and classes; not centred, and T plays no part.

    Ba and Caruana 2014 (https://arxiv.org/abs/1312.6184, equation 1), who sum over classes.
    """
    return F.mse_loss(student_logits, teacher_logits)


def bce(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · binary cross-entropy of sigmoid(student / T) with sigmoid(teacher / T), the mean over rows and classes.

    For several labels a row: each class is its own yes or no, and a softmax would let them compete.
    """
    teacher = torch.sigmoid(teacher_logits / temperature)
    return temperature**2 * F.binary_cross_entropy_with_logits(student_logits / temperature, teacher)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    *,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """Decoupled distillation, T² · (alpha · TCKD + beta · NCKD): Zhao et al. 2022, https://arxiv.org/abs/2203.08679.

    KL is the sum of one KL of the target class against all others, TCKD, and one among the others, NCKD, which it
    weighs by 1 − the teacher's target probability: least where the teacher is sure and knows most. Here NCKD has a
    weight of its own. Both weights are the defaults of the authors' repository (megvii-research/mdistiller,
    `_C.DKD`: ALPHA 1, BETA 8). With two classes NCKD is 0.

    The target of a row is its label; the teacher's first choice where it has none.
    """
    given = labels if labels is not None else torch.full_like(teacher_logits[:, 0], UNLABELLED, dtype=torch.int64)
    target = torch.where(given == UNLABELLED, teacher_logits.argmax(dim=-1), given).unsqueeze(-1)
    student, student_others = _decoupled(student_logits / temperature, target)
    teacher, teacher_others = _decoupled(teacher_logits / temperature, target)
    tckd, nckd = _divergence(teacher, student), _divergence(teacher_others, student_others)
    return temperature**2 * (target_weight * tckd + other_weight * nckd).mean()


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    *,
    rows_weight: float = 1.0,
    columns_weight: float = 1.0,
) -> Tensor:
    """T² · (beta · (1 − Pearson of rows) + gamma · (1 − Pearson of columns)) of the softened probabilities.

    Huang et al. 2022 (https://arxiv.org/abs/2205.10536): a student far smaller than its teacher keeps how the
    teacher's answers relate, in a row and in a class over the batch, not their size. Weights as in the authors'
    repository (hunto/DIST_KD, `DIST`: 1 and 1).

    A single row has no columns to compare, and only the rows' term is taken. With two classes a row's correlation
    is 1 or −1 and teaches nothing: the columns do.
    """
    student = F.softmax(student_logits / temperature, dim=-1)
    teacher = F.softmax(teacher_logits / temperature, dim=-1)
    loss = rows_weight * (1 - _pearson(student, teacher).mean())
    if len(student) > 1:
        loss = loss + columns_weight * (1 - _pearson(student.T, teacher.T).mean())
    return temperature**2 * loss


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · KL(student_T ‖ teacher_T): a student too small for all that the teacher says keeps to what is surely right.

    Gu et al. 2024 (MiniLLM, https://arxiv.org/abs/2306.08543, section 2.1), here on the given texts.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * _divergence(student, teacher).mean()


def jsd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · Jensen-Shannon divergence, half the KL of each to the mean of both: bounded by T² · log 2.

    Agarwal et al. 2024 (GKD, https://arxiv.org/abs/2306.13649, equation 1) with β = 1/2.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    mean = torch.logaddexp(student, teacher) - math.log(2)
    return temperature**2 * 0.5 * (_divergence(teacher, mean) + _divergence(student, mean)).mean()


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "kl": kl,
    "reverse-kl": reverse_kl,
    "jsd": jsd,
    "soft-ce": soft_cross_entropy,
    "mse": mse,
    "bce": bce,
    "dkd": dkd,
    "dist": dist,
}


# --- soft targets of language models


def with_rest(student_logits: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's log probabilities of the same k outcomes, as if there were no others.

    A teacher's answer to a token holds k of V probabilities: those of the highest ones, and of some that were drawn
    from the rest by their probability. Each drawn one stands for an equal part of the rest's mass r: of m drawn, token
    s has r / m under the teacher and q(s) / p(s) · r / m under the student. So a sum over outcomes is in the mean the
    one over all V (importance sampling), and any loss of logits can be taken of the two.

    Args:
        student_logits: float [M, V].
        packed: float [M, 1 + 2k] as `kdexport.tasks.packed` describes them.

    Returns:
        Twice float [M, k].
    """
    ids, teacher = packed[:, 1::2].long(), packed[:, 2::2].float()
    student = F.log_softmax(student_logits.float(), dim=-1).gather(1, ids)
    m = drawn_of(ids.shape[1], student_logits.shape[1])
    if m == 0:
        return student, teacher
    top, drawn = teacher[:, :-m], teacher[:, -m:]
    rest = torch.log((1 - top.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-6)) - math.log(m)
    return torch.cat([student[:, :-m], student[:, -m:] - drawn + rest], dim=-1), torch.cat(
        [top, rest.expand(-1, m)], -1
    )


# --- inside


def _divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL of each row [B], from log probabilities [B, C]."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


def _decoupled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (target, not target) [B, 2], and of the others among themselves [B, C − 1].

    Args:
        logits: float [B, C].
        target: int64 [B, 1].
    """
    is_other = torch.ones_like(logits, dtype=torch.bool).scatter(-1, target, value=False)
    others = logits[is_other].view(len(logits), -1)
    two = torch.cat([logits.gather(-1, target), torch.logsumexp(others, dim=-1, keepdim=True)], dim=-1)
    return F.log_softmax(two, dim=-1), F.log_softmax(others, dim=-1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row [N], of two tables [N, M]; 0 where a row is constant."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(dim=-1) / (lengths + 1e-8)
