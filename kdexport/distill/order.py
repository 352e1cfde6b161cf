"""The order of training rows."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


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
        random, size = np.random.default_rng([self._seed, self._epoch]), self._batch_size
        shuffled = random.permutation(len(self._lengths))
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), 50 * size):
            pool = shuffled[start : start + 50 * size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")].tolist()
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        rest = [batches.pop()] if batches and len(batches[-1]) < size else []
        random.shuffle(batches)
        for batch in batches + rest:
            yield from batch
