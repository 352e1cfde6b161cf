"""Vectors of texts: similarity, neighbours, and smaller number formats; numpy only."""

from typing import Literal, get_args

import numpy as np

from kdexport.errors import DataError
from kdexport.tasks.metrics import Array

EmbeddingDtype = Literal["float", "int8", "binary"]
DTYPES: tuple[EmbeddingDtype, ...] = get_args(EmbeddingDtype)
NEAREST = 10
# Components of a unit vector of width D are about 1/√D; int8 clips those of four times that.
_CLIP = 4.0
_AT_ONCE = 1024
_MOST = 5000  # among which neighbours are looked for, to bound time and memory


def unit(vectors: Array) -> Array:
    """Return vectors [..., D] at length 1; zeros stay zeros."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


def cosines(a: Array, b: Array) -> Array:
    """Return the cosine of each row of a with the same row of b [N, D]: [N]."""
    return np.asarray((unit(a) * unit(b)).sum(axis=-1))


def shortened(vectors: Array, dimensions: int | None) -> Array:
    """Return the first dimensions of vectors [N, D], at length 1 again; raise DataError where there are fewer."""
    check_dimensions(vectors.shape[-1], dimensions)
    return vectors if dimensions in (None, vectors.shape[-1]) else unit(vectors[..., :dimensions])


def check_dimensions(width: int, dimensions: int | None) -> None:
    """Raise DataError where vectors of this width have no such part."""
    if dimensions is not None and not 0 < dimensions <= width:
        raise DataError(f"the model's vectors have {width} dimensions, not {dimensions}", "Ask for fewer")


def encoded(vectors: Array, dtype: EmbeddingDtype) -> Array:
    """Return vectors [N, D] in a smaller format, comparable by dot products or Hamming distance.

    int8 has 32 steps for a standard deviation of a unit vector's components, the same for every vector. binary has the
    sign of each component as a bit, the first in a byte's highest, uint8 [N, ⌈D / 8⌉].
    """
    match dtype:
        case "float":
            return vectors.astype(np.float32)
        case "int8":
            scaled = unit(vectors) * (127 * vectors.shape[-1] ** 0.5 / _CLIP)
            return np.asarray(np.clip(np.rint(scaled), -127, 127), dtype=np.int8)
        case "binary":
            return np.packbits(vectors > 0, axis=-1)


def decoded(vectors: Array, dtype: EmbeddingDtype, width: int) -> Array:
    """Return what a search sees of encoded vectors, float32 [N, D]: cosines of signs rank as Hamming distances do."""
    if dtype != "binary":
        return vectors.astype(np.float32)
    return np.unpackbits(vectors, axis=-1, count=width).astype(np.float32) * 2 - 1


def nearest(vectors: Array, k: int = NEAREST) -> Array:
    """Return the places of each vector's k nearest others by cosine, int64 [N, k], not in order; fewer where N ≤ k.

    Of many vectors, the nearest among some of them, always the same places for the same N.
    """
    every = unit(vectors.astype(np.float32))
    among = np.sort(np.random.default_rng(0).permutation(len(every))[:_MOST])
    k, found = min(k, len(among) - 1), []
    for start in range(0, len(every), _AT_ONCE):
        similar = every[start : start + _AT_ONCE] @ every[among].T
        similar[np.arange(start, start + len(similar))[:, None] == among] = -np.inf
        found.append(among[np.argpartition(-similar, max(0, k - 1), axis=1)[:, :k]])
    return np.concatenate(found)


def overlap(a: Array, b: Array, k: int = NEAREST) -> Array:
    """Return for each row the fraction of its k `nearest` by a [N, D] that are also by b [N, E]: float [N]."""
    if len(a) < 2:
        return np.ones(len(a))
    ours, theirs = nearest(a, k), nearest(b, k)
    return np.array([len(np.intersect1d(x, y, assume_unique=True)) / len(x) for x, y in zip(ours, theirs, strict=True)])
