"""Packed answers of language models: the columns of [T, 1 + 2k], and the outcomes that they hold.

For each token, log p of the token that is there, then id and log p of k outcomes: the most probable ones, and some that
are drawn from the rest, which stand for its mass (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870).
"""

from __future__ import annotations

import numpy as np

from kdexport.tasks.metrics import Array

LOG_P, BEST = 0, 1


def drawn_of(k: int, vocabulary: int) -> int:
    """How many of k tokens are drawn from what the others leave; none where k are all."""
    return k // 4 if k < vocabulary else 0


def drawn(logs: Array, best: Array, count: int, tokens: Array) -> Array:
    """Tokens for each row of log probabilities [N, V], drawn from all but the best: int64 [N, count].

    A text's are always the same, and one may come twice.
    """
    draw = np.random.default_rng(tokens.tolist())
    rest = np.exp(logs.astype(np.float64))
    np.put_along_axis(rest, best, 0.0, axis=1)
    sums = np.cumsum(rest, axis=1)
    places = draw.random((len(logs), count)) * sums[:, -1:]
    found = [np.searchsorted(sums[i], places[i], side="right") for i in range(len(logs))]
    return np.asarray(np.minimum(np.stack(found), logs.shape[1] - 1))


def most_probable(logs: Array, k: int) -> Array:
    """The k most probable tokens of each row [N, V], the first one first: int64 [N, k]."""
    if k == 1:
        return np.asarray(logs.argmax(axis=1)[:, None])
    some = np.argpartition(logs, -k, axis=1)[:, -k:] if k < logs.shape[1] else np.arange(k)[None].repeat(len(logs), 0)
    order = np.argsort(-np.take_along_axis(logs, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
