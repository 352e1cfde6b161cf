"""Losses as pure functions of logits. The objective is a sum of weighted terms:

    alpha · Σ wᵢ · Lᵢ(student, teacher)  +  (1 − alpha) · CE(student, labels)

Hinton, Vinyals and Dean 2015 (https://arxiv.org/abs/1503.02531, section 2), with KL as the only L. `alpha` weights the
distillation loss against the label loss (λ in some papers). Gradients of probabilities softened by T shrink like 1/T²,
so these losses are multiplied by T².
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdexport.spec import Schedule
from kdexport.tasks.packed import drawn_of

# The label of a row that has none.
UNLABELLED = -100

# student logits [B, C], teacher logits [B, C], labels int64 [B] or None, temperature → a scalar, the mean over rows.
LogitLoss = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


class Term(NamedTuple):
    """One part of the objective, weight · size."""

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
    """Return the terms of one batch: the teacher's unless alpha is 0, the labels' unless it is 1.

    Args:
        student_logits: float [B, C].
        labels: int64 [B], `UNLABELLED` where a row has none; float [B, C] for label losses other than `ce`.
        teacher_logits: float [B, C]; None leaves the labels' term alone, with weight 1.
        losses: weights; names that are not in `LOGIT_LOSSES` are left to the caller.
        hard: one of `LABEL_LOSSES`.
        packed: whether the teacher's are packed log probabilities, see `with_rest`.
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
    """Return a setting at a progress from 0 to 1 of the training."""
    if isinstance(value, Schedule):
        return value.start + (value.end - value.start) * progress
    return value


def total(terms: Sequence[Term]) -> Tensor:
    """Return the weighted sum of the terms, a scalar."""
    return torch.stack([term.weight * term.size for term in terms]).sum()


# --- the labels' term


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the labelled rows and divided by all B rows.

    So a labelled row weighs the same in every batch, and a batch without labels gives 0.

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


LABEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": label_bce, "mse": label_mse}
# A task's objective → its labels' term.
OF_OBJECTIVE: dict[str, str] = {"classes": "ce", "tokens": "ce", "next-token": "ce", "several": "bce", "number": "mse"}


# --- the teacher's terms


def kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · KL(teacher_T ‖ student_T): Hinton, Vinyals and Dean 2015, section 2.1."""
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(teacher, student).mean()


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float
) -> Tensor:
    """−T² · Σ teacher_T · log student_T: `kl` plus the teacher's entropy, with the same gradients."""
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    return -(temperature**2) * (teacher.exp() * student).sum(dim=-1).mean()


def mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Mean squared difference of the logits, over rows and classes; not centred, and independent of T.

    Ba and Caruana 2014 (https://arxiv.org/abs/1312.6184, equation 1), who sum over classes.
    """
    return F.mse_loss(student_logits, teacher_logits)


def bce(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · binary cross-entropy of sigmoid(student / T) with sigmoid(teacher / T), the mean over rows and classes."""
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

    KL is the KL of the target class against all others, TCKD, plus the KL among the others, NCKD, times 1 − the
    teacher's target probability. Here NCKD has a weight of its own; both are the defaults of the authors' repository
    (megvii-research/mdistiller, `_C.DKD`: ALPHA 1, BETA 8). With two classes NCKD is 0. The target of a row without a
    label is the teacher's first choice.
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

    Huang et al. 2022 (https://arxiv.org/abs/2205.10536), with the weights of the authors' repository (hunto/DIST_KD,
    `DIST`: 1 and 1). A single row has no columns' term. With two classes a row's correlation is ±1, and only the
    columns teach.
    """
    student, teacher = (logs.exp() for logs in _softened(student_logits, teacher_logits, temperature))
    loss = rows_weight * (1 - _pearson(student, teacher).mean())
    if len(student) > 1:
        loss = loss + columns_weight * (1 - _pearson(student.T, teacher.T).mean())
    return temperature**2 * loss


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · KL(student_T ‖ teacher_T), which seeks modes where the student is too small for the whole distribution.

    Gu et al. 2024 (MiniLLM, https://arxiv.org/abs/2306.08543, section 2.1), here on the given texts.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(student, teacher).mean()


def jsd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · Jensen-Shannon divergence, half the KL of each to the mean of both: bounded by T² · log 2.

    Agarwal et al. 2024 (GKD, https://arxiv.org/abs/2306.13649, equation 1) with β = 1/2.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
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
    """Return the student's and the teacher's log probabilities of the same k outcomes, each float [M, k].

    A teacher's output for a token holds k of V probabilities: the highest ones, and m samples of the rest, whose mass
    is r. A sampled token s has r / m under the teacher and q(s) / p(s) · r / m under the student, so a sum over the
    outcomes is in expectation the one over all V (importance sampling).

    Args:
        student_logits: float [M, V].
        packed: float [M, 1 + 2k], see `kdexport.tasks.packed`.
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


def _softened(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities [B, C] of both at a temperature."""
    return F.log_softmax(student_logits / temperature, dim=-1), F.log_softmax(teacher_logits / temperature, dim=-1)


def _divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL of each row [B], from log probabilities [B, C]."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


def _decoupled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (target [B, 1], not target) [B, 2], and of the others among themselves [B, C − 1]."""
    is_other = torch.ones_like(logits, dtype=torch.bool).scatter(-1, target, value=False)
    others = logits[is_other].view(len(logits), -1)
    two = torch.cat([logits.gather(-1, target), torch.logsumexp(others, dim=-1, keepdim=True)], dim=-1)
    return F.log_softmax(two, dim=-1), F.log_softmax(others, dim=-1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row [N], of two tables [N, M]; 0 where a row is constant."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(dim=-1) / (lengths + 1e-8)
