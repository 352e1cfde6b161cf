"""Losses as pure functions of logits; torch only.

The objective (Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531, section 2):

    alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − alpha) · CE(student, labels)

T² keeps the gradient of the first term at the size of the second's whatever T is, so that T changes what is
learned and alpha alone how much.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher_T ‖ student_T), the mean over rows.

    Args:
        student_logits, teacher_logits: float [B, C].
        temperature: T > 0; both sides are divided by it before the softmax.

    Returns:
        A scalar ≥ 0, zero only where both give the same probabilities.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    temperature: float,
    alpha: float,
) -> Tensor:
    """The objective above; without soft targets it is the cross-entropy with the labels alone.

    Args:
        student_logits: float [B, C].
        labels: int64 [B].
        teacher_logits: float [B, C], or None.
        temperature: T of the teacher's term.
        alpha: weight of the teacher's term, from 0 to 1.
    """
    if teacher_logits is None or alpha == 0:
        return F.cross_entropy(student_logits, labels)
    soft = kl_divergence(student_logits, teacher_logits.to(student_logits.dtype), temperature)
    if alpha == 1:
        return soft
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
