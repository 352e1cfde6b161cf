"""The order of training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from kdexport.tasks.metrics import Array


class ByLength(Sampler[int]):
    """A random order every epoch with batches of similar length, so that little is padding.

    Rows are shuffled, cut into pools of 50 batches, sorted by length inside each pool, and the batches are shuffled
    again. The order is a function of seed and epoch alone: a resumed training sees the same one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        shuffled = random.permutation(len(self._lengths))
        pool = 50 * self._batch_size
        batches = [
            sorted_pool[i : i + self._batch_size]
            for start in range(0, len(shuffled), pool)
            for sorted_pool in [_sorted_by(self._lengths, shuffled[start : start + pool])]
            for i in range(0, len(sorted_pool), self._batch_size)
        ]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        random.shuffle(full)
        rest = [batch for batch in batches if len(batch) < self._batch_size]  # at most one, so it comes last
        for batch in full + rest:
            yield from batch.tolist()


def _sorted_by(lengths: Array, chosen: Array) -> Array:
    return np.asarray(chosen[np.argsort(lengths[chosen], kind="stable")])
