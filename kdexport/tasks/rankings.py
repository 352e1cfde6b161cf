"""Metrics of rankings, of each query by itself: nDCG, reciprocal rank and recall, as trec_eval and BEIR have them.

`scores` and `gains` are [..., N]: those of a query's N documents. A gain above 0 is relevant, and more is better.
Documents of equal scores are ranked by their gains, the lowest first: a model gains nothing by scoring all alike.
A query without a relevant document has the value NaN.
"""

import numpy as np

from kdexport.tasks.metrics import Array

DEEPEST = 100  # of the cuts below


def ndcg(scores: Array, gains: Array, k: int = 10) -> Array:
    """Return the normalised discounted cumulative gain of the k best (Järvelin and Kekäläinen 2002): float64 [...].

    A document's gain counts 1 / log2(1 + rank), as it is, not as 2 ** gain − 1.
    """
    found, ideal = (_discounted(_best(by, gains, k)) for by in (scores, gains))
    return _of(found, ideal)


def mrr(scores: Array, gains: Array, k: int = 10) -> Array:
    """Return 1 / rank of the first relevant document, 0 where none is among the k best: float64 [...]."""
    relevant = _best(scores, gains, k) > 0
    found = np.where(relevant.any(axis=-1), 1.0 / (1 + relevant.argmax(axis=-1)), 0.0)
    return np.asarray(np.where((gains > 0).any(axis=-1), found, np.nan))


def recall(scores: Array, gains: Array, k: int = DEEPEST) -> Array:
    """Return the fraction of the relevant documents that are among the k best: float64 [...]."""
    found, there = ((some > 0).sum(axis=-1).astype(np.float64) for some in (_best(scores, gains, k), gains))
    return _of(found, there)


def _of(part: Array, whole: Array) -> Array:
    return np.asarray(np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0))


def _best(scores: Array, gains: Array, k: int) -> Array:
    """Return the gains of the k documents of the highest scores, in order: float64 [..., at most k]."""
    order = np.lexsort((gains, -scores), axis=-1)[..., :k]
    return np.maximum(np.take_along_axis(np.asarray(gains, dtype=np.float64), order, axis=-1), 0.0)


def _discounted(gains: Array) -> Array:
    return np.asarray((gains / np.log2(2 + np.arange(gains.shape[-1]))).sum(axis=-1))
