"""Losses as pure functions of logits. The objective is a sum of weighted terms:

    alpha · Σ wᵢ · Lᵢ(student, teacher)  +  (1 − alpha) · CE(student, labels)

Hinton, Vinyals and Dean 2015 (https://arxiv.org/abs/1503.02531, section 2), with KL as the only L. `alpha` weights the
distillation loss against the label loss (λ in some papers). Gradients of probabilities softened by T shrink like 1/T²,
so these losses are multiplied by T².
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdexport.spec import Schedule
from kdexport.tasks.config import NO_LABEL
from kdexport.tasks.packed import drawn_of
from kdexport.tasks.transcripts import NEVER

# The weight in the repository of DKD's authors (megvii-research/mdistiller, `_C.DKD`: ALPHA 1, BETA 8).
_NCKD_WEIGHT = 8.0

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

    Without the teacher's logits the labels' term, `hard`, stands alone with weight 1. Of `losses` (name → weight) those
    of layers are left to the caller. `packed` teacher's logits are those of `with_rest`.
    """
    label_loss = LABEL_LOSSES[hard]
    if teacher_logits is None:
        return [Term(hard, 1.0, label_loss(student_logits, labels))]
    student, teacher = student_logits.float(), teacher_logits.float()
    both = with_rest(student, teacher) if packed and alpha > 0 else (student, teacher)
    targets = None if packed else labels  # among the k outcomes they have other places
    steps = by_step(student, teacher) if hard == "ctc" else both
    terms = [
        Term(name, alpha * weight, LOGIT_LOSSES[name](*(both if name == hard else steps), targets, temperature))
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
    """Cross-entropy with int64 [B], summed over the labelled rows and divided by all B rows.

    So a labelled row weighs the same in every batch, and a batch without labels gives 0.
    """
    return F.cross_entropy(student_logits, labels, ignore_index=NO_LABEL, reduction="sum") / len(labels)


def label_bce(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy with float [B, C], NaN where a row has no label; over rows as `cross_entropy`."""
    known = ~labels.isnan().any(dim=1)
    each = F.binary_cross_entropy_with_logits(student_logits[known], labels[known].float(), reduction="none")
    return each.mean(dim=1).sum() / len(labels)


def label_mse(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Squared difference from float [B, C], NaN where a row has no label; over rows as `cross_entropy`."""
    known = ~labels.isnan().any(dim=1)
    return (student_logits[known] - labels[known].float()).square().mean(dim=1).sum() / len(labels)


def ctc(student_logits: Tensor, labels: Tensor) -> Tensor:
    """CTC loss by character, with int64 [B, L], −1 behind the last one, −100 in a row without; over rows as above.

    Graves et al. 2006, section 4. Student logits are [B, T, C], with certain blanks behind a recording's end. A text of
    more characters than there are steps has no path, and teaches nothing.
    """
    known = labels[:, 0] != NO_LABEL
    if not known.any():
        return student_logits.sum() * 0.0
    logs = F.log_softmax(student_logits[known].float(), dim=-1).transpose(0, 1)
    texts, steps = labels[known], torch.full((int(known.sum()),), student_logits.shape[1])
    lengths = (texts >= 0).sum(dim=1)
    each = F.ctc_loss(logs, texts.clamp(min=0), steps, lengths, reduction="none", zero_infinity=True)
    return (each / lengths.clamp(min=1)).sum() / len(labels)


def listwise(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a query's scores with its gains, as fractions of their sum, the mean over the batch's queries.

    ListNet's top-one loss (Cao et al. 2007, https://doi.org/10.1145/1273496.1273513, section 4) with gains that are not
    exponentiated. `labels` are float [B, 2], gain and query; rows without a gain, and queries without a relevant
    passage, teach nothing.
    """
    gains, same = labels[:, 0].nan_to_num(0.0).clamp(min=0), _of_same_query(labels)
    wanted = gains / (same * gains).sum(dim=1).clamp(min=1e-9)
    return -(wanted * _among(student_logits, same & ~labels[None, :, 0].isnan()).diagonal()).sum() / _count(same)


LABEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy, "bce": label_bce, "mse": label_mse, "ctc": ctc, "listwise": listwise
}  # fmt: skip
# A task's objective → its labels' term.
OF_OBJECTIVE: dict[str, str] = {
    "classes": "ce", "tokens": "ce", "next-token": "ce", "several": "bce", "number": "mse", "ctc": "ctc",
    "ranking": "listwise",
    "vectors": "mse",  # never taken: alpha is 1
}  # fmt: skip


# --- the teacher's terms


def _of_softened(loss: Callable[[Tensor, Tensor], Tensor]) -> LogitLoss:
    """Return T² · the loss of the student's and the teacher's log probabilities [B, C] at temperature T."""

    @wraps(loss)
    def of_logits(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
        student, teacher = (F.log_softmax(z / temperature, dim=-1) for z in (student_logits, teacher_logits))
        return temperature**2 * loss(student, teacher)

    return of_logits


@_of_softened
def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student): Hinton, Vinyals and Dean 2015, section 2.1."""
    return _divergence(teacher, student).mean()


@_of_softened
def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """−Σ teacher · log student: `kl` plus the teacher's entropy, with the same gradients."""
    return -(teacher.exp() * student).sum(dim=-1).mean()


@_of_softened
def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher), which seeks modes where the student is too small for the whole distribution.

    Gu et al. 2024 (MiniLLM, https://arxiv.org/abs/2306.08543, section 2.1), here on the given texts.
    """
    return _divergence(student, teacher).mean()


@_of_softened
def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence, half the KL of each to the mean of both: at most log 2.

    Agarwal et al. 2024 (GKD, https://arxiv.org/abs/2306.13649, equation 1) with β = 1/2.
    """
    mean = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (_divergence(teacher, mean) + _divergence(student, mean)).mean()


@_of_softened
def dist(student: Tensor, teacher: Tensor) -> Tensor:
    """(1 − Pearson of rows) + (1 − Pearson of columns) of the probabilities.

    Huang et al. 2022 (https://arxiv.org/abs/2205.10536), with the weights of the authors' repository (hunto/DIST_KD,
    `DIST`: 1 and 1). A single row has no columns' term. With two classes a row's correlation is ±1, and only the
    columns teach.
    """
    student, teacher = student.exp(), teacher.exp()
    loss = 1 - _pearson(student, teacher).mean()
    if len(student) > 1:
        loss = loss + (1 - _pearson(student.T, teacher.T).mean())
    return loss


def mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Mean squared difference of the logits, over rows and classes; not centred, and independent of T.

    Ba and Caruana 2014 (https://arxiv.org/abs/1312.6184, equation 1), who sum over classes.
    """
    return F.mse_loss(student_logits, teacher_logits)


def bce(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · binary cross-entropy of sigmoid(student / T) with sigmoid(teacher / T), the mean over rows and classes."""
    teacher = torch.sigmoid(teacher_logits / temperature)
    return temperature**2 * F.binary_cross_entropy_with_logits(student_logits / temperature, teacher)


def margin_mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Mean squared difference of the margins between two passages of a query, over the batch's pairs.

    Hofstätter et al. 2020 (https://arxiv.org/abs/2010.02666, section 4.2): one of each pair is relevant there.
    """
    assert labels is not None
    both = _of_same_query(labels).triu(diagonal=1)
    off = (student_logits - teacher_logits)[:, 0]
    return (off[:, None] - off)[both].square().sum() / both.sum().clamp(min=1)


def listwise_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmax over a query's passages in the batch, the mean over its queries."""
    assert labels is not None
    same = _of_same_query(labels)
    student, teacher = (_among(logits / temperature, same) for logits in (student_logits, teacher_logits))
    each = torch.where(same, teacher.exp() * (teacher - student), 0.0).sum(dim=1)
    return temperature**2 * (each / same.sum(dim=1)).sum() / _count(same)


def dkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Decoupled distillation, T² · (TCKD + 8 · NCKD): Zhao et al. 2022, https://arxiv.org/abs/2203.08679.

    KL is the KL of the target class against all others, TCKD, plus the KL among the others, NCKD, times 1 − the
    teacher's target probability. Here NCKD has a weight of its own. With two classes NCKD is 0. The target of a row
    without a label is the teacher's first choice.
    """
    choice = teacher_logits.argmax(dim=-1)
    target = (choice if labels is None else torch.where(labels == NO_LABEL, choice, labels)).unsqueeze(-1)
    student, student_others = _decoupled(student_logits / temperature, target)
    teacher, teacher_others = _decoupled(teacher_logits / temperature, target)
    tckd, nckd = _divergence(teacher, student), _divergence(teacher_others, student_others)
    return temperature**2 * (tckd + _NCKD_WEIGHT * nckd).mean()


def ctc_of_teacher(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """CTC loss of the text of the teacher's most probable path, whose steps of time may be others.

    Takashima et al. 2020 (https://arxiv.org/abs/2005.09310), distillation by the sequence.
    """
    path = teacher_logits.argmax(dim=-1)
    new = (path != F.pad(path, (1, 0), value=-1)[:, :-1]) & (path > 0)
    texts = [row[keep] for row, keep in zip(path, new, strict=True)]
    targets = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)
    return ctc(student_logits, F.pad(targets, (0, 1), value=-1))  # all of them may be empty


def by_step(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return both logits [M, C] at the M steps that the recordings of a batch [B, T, C] have, for losses of rows.

    Steps without logits of the teacher's own are left out: the certain blanks behind a recording's end, and paths made
    of a transcript. Both are exactly 0 and `NEVER`.
    """
    steps = min(student_logits.shape[1], teacher_logits.shape[1])
    student_logits, teacher_logits = student_logits[:, :steps], teacher_logits[:, :steps]
    heard = ((teacher_logits != 0) & (teacher_logits != NEVER)).any(dim=-1)
    if not heard.any():
        return student_logits[:, 0], student_logits[:, 0].detach()
    return student_logits[heard], teacher_logits[heard]


def cosine(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """1 − cos of the student's and the teacher's vectors [B, D], the mean over rows; independent of T."""
    return 1 - F.cosine_similarity(student_logits, teacher_logits, dim=-1).mean()


def similarity(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """KL of how each text's cosines to the others of the batch are distributed, softmax(cos / T): the mean over rows.

    Fang et al. 2021 (SEED, https://arxiv.org/abs/2101.04731, equation 4), here within the batch, without a queue.
    Vectors may differ in width. A single row teaches nothing.
    """
    if len(student_logits) < 2:
        return student_logits.sum() * 0.0
    itself = torch.eye(len(student_logits), dtype=torch.bool, device=student_logits.device)
    student, teacher = (
        F.log_softmax((v @ v.T / temperature).masked_fill(itself, -1e4), dim=-1)
        for v in (F.normalize(student_logits, dim=-1), F.normalize(teacher_logits, dim=-1))
    )
    return _divergence(teacher, student).mean()


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "ctc": ctc_of_teacher,
    "kl": kl,
    "reverse-kl": reverse_kl,
    "jsd": jsd,
    "soft-ce": soft_cross_entropy,
    "mse": mse,
    "bce": bce,
    "dkd": dkd,
    "dist": dist,
    "margin-mse": margin_mse,
    "listwise-kl": listwise_kl,
    "cosine": cosine,
    "similarity": similarity,
}


# --- soft targets of language models


def with_rest(student_logits: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's log probabilities of the same k outcomes, each float [M, k].

    A teacher's output for a token holds k of V probabilities: the highest ones, and m samples of the rest, whose mass
    is r. A sampled token s has r / m under the teacher and q(s) / p(s) · r / m under the student, so a sum over the
    outcomes is in expectation the one over all V (importance sampling). `packed` [M, 1 + 2k]: see `tasks.packed`.
    """
    ids, teacher = packed[:, 1::2].long(), packed[:, 2::2].float()
    student = F.log_softmax(student_logits.float(), dim=-1).gather(1, ids)
    m = drawn_of(ids.shape[1], student_logits.shape[1])
    if m == 0:
        return student, teacher
    top, drawn = teacher[:, :-m], teacher[:, -m:]
    rest = torch.log((1 - top.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-6)) - math.log(m)
    outcomes = torch.cat([student[:, :-m], student[:, -m:] - drawn + rest], dim=-1)
    return outcomes, torch.cat([top, rest.expand(-1, m)], dim=-1)


def _divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL of each row [B], from log probabilities [B, C]."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


def _of_same_query(labels: Tensor) -> Tensor:
    """Return for each pair of rows whether they have the same query: bool [B, B]."""
    return labels[:, None, 1] == labels[:, 1]


def _among(scores: Tensor, same: Tensor) -> Tensor:
    """Log softmax of scores [B, 1] over the rows of each row's query: [B, B], near −∞ for the others."""
    return F.log_softmax(scores[:, 0].float().expand(len(same), -1).masked_fill(~same, -1e9), dim=1)


def _count(same: Tensor) -> Tensor:
    """The number of queries in a batch."""
    return (1 / same.sum(dim=1)).sum()


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
