"""Several answers to a text → one: of several teachers, or of one that reads it several times.

Hinton, Vinyals and Dean 2015 (https://arxiv.org/abs/1503.02531, section 1) take the arithmetic or the geometric mean
of the teachers' distributions as soft targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from kdexport.errors import ModelError
from kdexport.tasks.metrics import Array


def combine(logits: Sequence[Array], weights: Sequence[float] | None, how: Literal["mean", "log-mean"]) -> Array:
    """The combination of K answers, as logits again: `softmax(result)` is the mean distribution.

    A temperature acts on the result, so on the mean and not on what it was taken of. For `log-mean` that is the same
    thing: T divides a weighted mean of logits, so the softened mean is the mean of the softened. For `mean` it is not:
    softening the mean keeps what the answers agree on, T = 1 gives exactly the mean of their probabilities.

    Args:
        logits: K arrays float [N, C], their columns in the same order.
        weights: K positive numbers, of any sum; equal when None.
        how: `mean`, Σ wᵢ · softmax(zᵢ); or `log-mean`, Π softmax(zᵢ)^wᵢ, renormalised.

    Returns:
        float32 [N, C]: log probabilities; of a single answer the logits as they are.
    """
    if len(logits) == 1:
        return logits[0].astype(np.float32)
    shares = np.asarray(weights if weights is not None else np.ones(len(logits)), dtype=np.float64)
    shares /= shares.sum()
    logs = [log_softmax(z) for z in logits]
    if how == "log-mean":
        mean = sum((w * z for w, z in zip(shares, logs, strict=True)), np.zeros_like(logs[0]))
    else:
        mean = np.logaddexp.reduce([z + np.log(w) for w, z in zip(shares, logs, strict=True)], axis=0)
    return log_softmax(mean).astype(np.float32)


def log_softmax(logits: Array) -> Array:
    """Log probabilities along the last axis, float64, computed without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def columns_of(ours: Sequence[str], theirs: Sequence[str], our_name: str, their_name: str) -> list[int]:
    """Where each of our labels stands among theirs: `logits[:, columns]` has our order.

    Raises:
        ModelError: one has a label that the other has not.
    """
    place = {label: i for i, label in enumerate(theirs)}
    if set(ours) != set(theirs):
        only = {our_name: [x for x in ours if x not in place], their_name: [x for x in theirs if x not in set(ours)]}
        told = ", ".join(f"only {name} has {_some(labels)}" for name, labels in only.items() if labels)
        raise ModelError(f"teachers of different labels can't be combined: {told}", "Name teachers of the same labels")
    return [place[label] for label in ours]


def _some(labels: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(repr(label) for label in labels[:most])
    return shown if len(labels) <= most else f"{shown} and {len(labels) - most} more"
