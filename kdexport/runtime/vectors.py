"""Vectors of many texts in one file, which need not fit in memory: `np.load(file, mmap_mode="r")` reads parts of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kdexport.files import written
from kdexport.tasks.metrics import Array


@contextmanager
def appending(path: Path, like: Array) -> Iterator[Callable[[Array], None]]:
    """Yield a function that adds vectors of the type and width of `like` [N, D] to a new .npy file.

    The file appears when the block ends. Raises FileExistsError where there is one.
    """
    rows = 0

    def write_head() -> None:
        file.seek(0)
        kind = np.lib.format.dtype_to_descr(like.dtype)
        head = {"descr": kind, "fortran_order": False, "shape": (rows, like.shape[1])}
        np.lib.format.write_array_header_1_0(file, head)  # numpy leaves room in it for more rows

    def append(vectors: Array) -> None:
        nonlocal rows
        file.write(np.ascontiguousarray(vectors).tobytes())
        rows += len(vectors)

    with written(path, new=True) as file:
        write_head()
        yield append
        write_head()
