"""The order of rows in training: a function of seed and epoch, whatever the number of processes."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from kdexport.tasks.metrics import Array


class ByLength(Sampler[int]):
    """A random order every epoch with batches of similar length, so that little is padding.

    Rows are shuffled, cut into pools of 50 batches, sorted by length inside each pool, and the batches are shuffled
    again. The order is a function of seed and epoch alone: a resumed training sees the same one. With `groups`, one
    number a row, what is shuffled and sorted are runs of rows of one group, at most a quarter of a batch each.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, groups: Array | None = None) -> None:
        self._lengths, self.batch_size, self._groups = np.asarray(lengths), batch_size, groups
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random, size = np.random.default_rng([self._seed, self._epoch]), self.batch_size
        shuffled, lengths = self._shuffled(random)
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), 50 * size):
            pool = shuffled[start : start + 50 * size]
            pool = pool[np.argsort(lengths[pool], kind="stable")].tolist()
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        rest = [batches.pop()] if batches and len(batches[-1]) < size else []
        random.shuffle(batches)
        for batch in batches + rest:
            yield from batch

    def _shuffled(self, random: np.random.Generator) -> tuple[Array, Array]:
        """Return the rows, those of a run one after the other, and the lengths that they are sorted by: their run's."""
        rows, lengths = random.permutation(len(self._lengths)), self._lengths
        if self._groups is None:
            return rows, lengths
        rows, most = rows[np.argsort(self._groups[rows], kind="stable")], max(2, self.batch_size // 4)
        of_groups = np.split(rows, np.flatnonzero(np.diff(self._groups[rows])) + 1)
        runs = [group[i : i + most] for group in of_groups for i in range(0, len(group), most)]
        random.shuffle(runs)
        lengths = lengths.copy()
        for run in runs:
            lengths[run] = lengths[run].max()
        return np.concatenate(runs), lengths


class Parts(Sampler[list[int]]):
    """The rows of each step in so many parts: accelerate deals them to the processes in turn.

    The rows of a step are the same for any number of parts.
    """

    def __init__(self, sampler: ByLength, parts: int) -> None:
        self.sampler, self._parts = sampler, parts  # accelerate sets the epoch of `sampler`

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.sampler.batch_size) * self._parts

    def __iter__(self) -> Iterator[list[int]]:
        rows, size = list(self.sampler), self.sampler.batch_size
        for start in range(0, len(rows), size):
            step = rows[start : start + size]
            while len(step) < self._parts:  # the last step: each process needs a row
                step = (step * 2)[: self._parts]
            yield from (part.tolist() for part in np.array_split(step, self._parts))

    def weight(self, rows: int, step: int) -> float:
        """Return the weight of a part's mean in a step's, relative to that of an equal part."""
        size, steps = self.sampler.batch_size, len(self) // self._parts
        of_step = len(self.sampler) - size * (steps - 1) if (step + 1) % steps == 0 else size
        return rows * self._parts / max(of_step, self._parts)
