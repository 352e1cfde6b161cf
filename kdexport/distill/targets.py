"""Soft targets on disk: one `.npy` file a split, written in blocks and memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array

_AT_ONCE = 256


class SoftTargets:
    """The teacher's logits of rows, or of some of them, read on access: `targets[places]` is float32 [B, …].

    Vectors [B, D] are read on the `axes` [D, d], where there are any.
    """

    def __init__(self, task: Task, *files: Path, axes: Array | None = None) -> None:
        self._task, self._files, self._axes = task, files, axes
        self._parts = [np.load(file, mmap_mode="r") for file in files]
        self._places = np.arange(sum(map(len, self._parts)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, chosen: Sequence[int] | Array | slice) -> Array:
        places, start = self._places[chosen], 0
        shape = self._task.unpack(np.asarray(self._parts[0][:0])).shape[1:]  # vectors of several teachers are wider
        found = np.empty((len(places), *shape), np.float32)
        for part in self._parts:
            here = (places >= start) & (places < start + len(part))
            if here.any():
                found[here] = self._task.unpack(np.asarray(part[places[here] - start]))
            start += len(part)
        return found if self._axes is None else np.asarray(found @ self._axes)

    def judged(self, places: Sequence[int]) -> Array:
        """Return the part of them that metrics read."""
        blocks = (places[i : i + _AT_ONCE] for i in range(0, len(places), _AT_ONCE))
        return np.concatenate([self._task.judged(self[block]) for block in blocks])

    def __iter__(self) -> Iterator[Array]:
        return (self[[i]][0] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_parts": [np.load(file, mmap_mode="r") for file in state["_files"]]}

    def take(self, places: Sequence[int] | Array) -> SoftTargets:
        """Return those at these places, in their order."""
        some = SoftTargets(self._task, *self._files, axes=self._axes)
        some._places = self._places[np.asarray(places, dtype=np.int64)]
        return some


def principal_axes(vectors: Array, width: int) -> tuple[Array, float]:
    """Return the principal axes of vectors [N, D], float32 [D, width], and the fraction of their energy that they hold.

    Of vectors as they are, not centred, so that as little as possible changes in their dot products.
    """
    values, axes = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    energy = float(values[-width:].sum() / max(values.sum(), 1e-12))
    return np.ascontiguousarray(axes[:, ::-1][:, :width], np.float32), energy


class Writer:
    """Write the rows of an array in blocks; a full disk is an error here, where a memory map would end the process."""

    def __init__(self, file: Any, rows: int) -> None:
        self._file, self._rows = file, rows

    def add(self, block: Array) -> None:
        """Append rows [B, …]; the first ones decide type and shape."""
        if self._file.tell() == 0:
            header = {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self._rows, *block.shape[1:])})
        self._file.write(np.ascontiguousarray(block).data)


@contextmanager
def writing(path: Path, rows: int) -> Iterator[Writer]:
    """Open a `.npy` file of so many rows for writing in blocks."""
    with path.open("wb") as file:
        yield Writer(file, rows)
