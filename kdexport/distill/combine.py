"""Combine outputs for a text: of several teachers, or of several passes of one.

Hinton, Vinyals and Dean 2015 (https://arxiv.org/abs/1503.02531, section 1): the arithmetic or geometric mean of the
teachers' distributions.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from kdexport.errors import ModelError
from kdexport.tasks.base import Task
from kdexport.tasks.config import Row
from kdexport.tasks.metrics import Array, log_softmax
from kdexport.tasks.vectors import unit

_SURE = 0.99  # of a label that a person gave


def combine(logits: Sequence[Array], weights: Sequence[float] | None, how: Literal["mean", "log-mean"]) -> Array:
    """Return the mean of K distributions, of logits [N, C] with the same columns, as float32 log probabilities [N, C].

    It is Σ wᵢ · softmax(zᵢ) for `mean`, and Π softmax(zᵢ)^wᵢ, renormalised, for `log-mean`; a single output's logits
    stay unchanged. A temperature acts on the result. For `log-mean`, a weighted mean of logits, softening and averaging
    commute; for `mean` they don't, and T = 1 gives exactly the mean of the probabilities.
    """
    if len(logits) == 1:
        return logits[0].astype(np.float32)
    shares = np.asarray(weights if weights is not None else np.ones(len(logits)), dtype=np.float64)
    shares /= shares.sum()
    logs = [log_softmax(z.astype(np.float64)) for z in logits]
    if how == "log-mean":
        mean = sum((w * z for w, z in zip(shares, logs, strict=True)), np.zeros_like(logs[0]))
    else:
        mean = np.logaddexp.reduce([z + np.log(w) for w, z in zip(shares, logs, strict=True)], axis=0)
    return log_softmax(mean).astype(np.float32)


def sure_of(task: Task, rows: Sequence[Row]) -> Array:
    """Return the logits float32 [N, C] of one who gives the rows their labels, with a probability of 0.99.

    The rest is spread over the other labels, as in label smoothing; of several labels each is as sure by itself.
    """
    wanted = task.label_array(rows)
    if wanted.ndim == 2:
        return np.asarray((2 * wanted - 1) * np.log(_SURE / (1 - _SURE)), np.float32)
    found = np.full((len(rows), len(task.labels)), np.log((1 - _SURE) / (len(task.labels) - 1)), np.float32)
    found[np.arange(len(rows)), wanted] = np.log(_SURE)
    return found


def joined(vectors: Sequence[Array], weights: Sequence[float] | None) -> Array:
    """Return the vectors [N, D₁ + …] of several teachers side by side: a cosine is the weighted mean of theirs."""
    if len(vectors) == 1:
        return vectors[0].astype(np.float32)
    shares = np.asarray(weights if weights is not None else np.ones(len(vectors)), dtype=np.float64)
    scaled = [w**0.5 * unit(v) for w, v in zip(shares / shares.sum(), vectors, strict=True)]
    return np.concatenate(scaled, axis=1).astype(np.float32)


def columns_of(ours: Sequence[str], theirs: Sequence[str], our_name: str, their_name: str) -> list[int]:
    """Return the place of each of our labels among theirs; raise ModelError where labels differ."""
    place = {label: i for i, label in enumerate(theirs)}
    if set(ours) != set(theirs):
        only = {our_name: [x for x in ours if x not in place], their_name: [x for x in theirs if x not in set(ours)]}
        found = ", ".join(f"only {name} has {_some(labels)}" for name, labels in only.items() if labels)
        raise ModelError(f"teachers of different labels can't be combined: {found}", "Name teachers of the same labels")
    return [place[label] for label in ours]


def _some(labels: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(repr(label) for label in labels[:most])
    return shown if len(labels) <= most else f"{shown} and {len(labels) - most} more"
