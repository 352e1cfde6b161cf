"""Packed outputs of models that write tokens, as `causal_lm` describes them: their lines, and the choice of tokens."""

from collections.abc import Sequence

import numpy as np

from kdexport.tasks.metrics import Array

LOG_P, BEST = 0, 1


def packed_lines(logs: Array, actual: Array, k: int, text: Sequence[int]) -> Array:
    """Return the lines [n, 1 + 2k] of log probabilities [n, V]: that of the actual token, and k tokens with theirs.

    `actual` is int64 [n]; `text` is the seed of the sampled tokens.
    """
    lines = np.empty((len(logs), 1 + 2 * k), np.float32)
    lines[:, LOG_P] = logs[np.arange(len(logs)), actual]
    best = most_probable(logs, k - drawn_of(k, logs.shape[1]))
    if best.shape[1] < k:
        best = np.concatenate([best, drawn(logs, best, k - best.shape[1], np.asarray(text))], axis=1)
    lines[:, 1::2] = best
    lines[:, 2::2] = np.take_along_axis(logs, best, axis=1)
    return lines


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


def compact(packed: Array, vocabulary: int) -> Array:
    """Return packed outputs [B, T, 1 + 2k] as records [B] of half their size.

    Ids have 16 bits where the vocabulary allows it, and log probabilities of tokens too, but for the actual token's.
    """
    length, k = packed.shape[1], packed.shape[2] // 2
    ids = np.uint16 if vocabulary <= 2**16 else np.uint32
    fields = [("log_p", np.float32, (length,)), ("ids", ids, (length, k)), ("logs", np.float16, (length, k))]
    records = np.empty(len(packed), fields)
    records["log_p"], records["ids"], records["logs"] = packed[..., LOG_P], packed[..., 1::2], packed[..., 2::2]
    return records


def whole(records: Array) -> Array:
    """Return the packed outputs float32 [B, T, 1 + 2k] of records [B]."""
    packed = np.empty((*records["log_p"].shape, 1 + 2 * records["ids"].shape[2]), np.float32)
    packed[..., LOG_P], packed[..., 1::2], packed[..., 2::2] = records["log_p"], records["ids"], records["logs"]
    return packed
