"""Packed outputs of language models, as `causal_lm` describes them: two of their columns, and the choice of tokens."""

import numpy as np

from kdexport.tasks.metrics import Array

LOG_P, BEST = 0, 1


def drawn_of(k: int, vocabulary: int) -> int:
    """Return how many of k tokens are sampled; none where k covers the vocabulary."""
    return k // 4 if k < vocabulary else 0


def drawn(logs: Array, best: Array, count: int, tokens: Array) -> Array:
    """Sample tokens for each row of log probabilities [N, V] from all but the best: int64 [N, count].

    The text's `tokens` are the seed; a token may be drawn twice.
    """
    draw = np.random.default_rng(tokens.tolist())
    rest = np.exp(logs.astype(np.float64))
    np.put_along_axis(rest, best, 0.0, axis=1)
    sums = np.cumsum(rest, axis=1)
    places = draw.random((len(logs), count)) * sums[:, -1:]
    found = [np.searchsorted(sums[i], places[i], side="right") for i in range(len(logs))]
    return np.asarray(np.minimum(np.stack(found), logs.shape[1] - 1))


def most_probable(logs: Array, k: int) -> Array:
    """Return the k most probable tokens of each row [N, V], in order: int64 [N, k]."""
    if k == 1:
        return np.asarray(logs.argmax(axis=1)[:, None])
    some = np.argpartition(logs, -k, axis=1)[:, -k:] if k < logs.shape[1] else np.arange(k)[None].repeat(len(logs), 0)
    order = np.argsort(-np.take_along_axis(logs, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
