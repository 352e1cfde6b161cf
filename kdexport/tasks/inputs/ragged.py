"""Encoded rows of different lengths, end to end."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

from kdexport.tasks.config import Arrays

# Above this number of rows small arrays for each would take too much memory: about a kilobyte a row.
MANY = 20_000
_AT_ONCE = 4096


class Ragged(Sequence[Arrays]):
    """Rows of integer arrays, some bytes an element; copies as int64 on access."""

    def __init__(self, rows: Iterable[Arrays]) -> None:
        values: dict[str, list[np.ndarray]] = {}
        sizes: dict[str, list[np.ndarray]] = {}
        left = iter(rows)
        while block := list(islice(left, _AT_ONCE)):
            for name in block[0]:
                arrays = [arrays[name] for arrays in block]
                whole = np.concatenate(arrays)
                values.setdefault(name, []).append(whole.astype(_smallest(whole)))
                sizes.setdefault(name, []).append(np.array([len(array) for array in arrays]))
        self._values = {name: np.concatenate(parts) for name, parts in values.items()}
        self._ends = {name: np.cumsum(np.concatenate(parts)) for name, parts in sizes.items()}

    def __len__(self) -> int:
        return max((len(ends) for ends in self._ends.values()), default=0)

    @overload
    def __getitem__(self, i: int) -> Arrays: ...
    @overload
    def __getitem__(self, i: slice) -> list[Arrays]: ...
    def __getitem__(self, i: int | slice) -> Arrays | list[Arrays]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i, found = range(len(self))[i], {}
        for name, ends in self._ends.items():
            start = ends[i - 1] if i else 0
            found[name] = self._values[name][start : ends[i]].astype(np.int64)
        return found

    def __iter__(self) -> Iterator[Arrays]:
        return (self[i] for i in range(len(self)))

    def sizes(self, name: str) -> list[int]:
        """Return the length of each row's array of this name."""
        found: list[int] = np.diff(self._ends[name], prepend=0).tolist()
        return found


def _smallest(values: np.ndarray) -> np.dtype:
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return np.promote_types(np.min_scalar_type(most), np.min_scalar_type(least))
