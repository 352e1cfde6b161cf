"""Arrays that a training reads in every epoch: in memory up to a limit, the others in a file without a name."""

import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self

import msgspec
import numpy as np

from kdexport.progress import warn
from kdexport.tasks.config import Arrays

_SHARE_OF_MEMORY, _SHARE_OF_DISK = 8, 2  # one in so many bytes
_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_limit = SimpleNamespace(megabytes=None)

_Record = dict[str, tuple[str, list[int], memoryview]]
_decoder = msgspec.msgpack.Decoder(_Record)


def limit_memory(megabytes: int | None) -> None:
    """Set the memory for the caches of this machine's processes; None for an eighth of it all."""
    _limit.megabytes = megabytes


def memory_for_cache() -> int:
    """Return the bytes for a cache in this process."""
    total = _memory() // _SHARE_OF_MEMORY if _limit.megabytes is None else _limit.megabytes * 1_000_000
    return total // _processes("LOCAL_WORLD_SIZE")


def _processes(variable: str) -> int:
    return int(os.environ.get(variable, "1"))


def _memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = _CONTAINER.read_text().strip() if _CONTAINER.is_file() else ""
    return min(memory, int(allowed)) if allowed.isdigit() else memory


class Cache:
    """Arrays of numbered rows, for several threads.

    The file is written and read, not mapped, so that what it holds never counts as this process's memory. It has no
    name in its folder, and so vanishes with the process, however that ends. Those of all processes of a run take at
    most half of what is free on the disk; rows beyond that are not cached.
    """

    def __init__(self, folder: Path, memory: int) -> None:
        self._memory, self._kept = memory, dict[int, Arrays]()
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._room, self._end = shutil.disk_usage(folder).free // _SHARE_OF_DISK // _processes("WORLD_SIZE"), 0
        self._starts = self._sizes = np.zeros(0, np.int64)
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._kept = {}
        self._file.close()

    def claim(self, rows: int) -> int:
        """Return the first number of so many new rows."""
        first = len(self._sizes)
        self._starts, self._sizes = (np.append(each, np.zeros(rows, np.int64)) for each in (self._starts, self._sizes))
        return first

    def __contains__(self, number: int) -> bool:
        return number in self._kept or bool(self._sizes[number])

    def get(self, number: int) -> Arrays | None:
        """Return a row's arrays, read-only; None if they are not cached."""
        if (kept := self._kept.get(number)) is not None:
            return kept
        if not (size := int(self._sizes[number])):
            return None
        found = _decoder.decode(os.pread(self._file.fileno(), size, int(self._starts[number])))
        return {name: np.frombuffer(data, dtype).reshape(shape) for name, (dtype, shape, data) in found.items()}

    def put(self, number: int, arrays: Arrays) -> None:
        """Cache a row's arrays if there is room."""
        size = sum(array.nbytes for array in arrays.values())
        with self._turn:
            if size <= self._memory:
                self._memory -= size
                self._kept[number] = arrays
                return
        record = msgspec.msgpack.encode({name: _plain(array) for name, array in arrays.items()})
        with self._turn:
            start = self._end
            self._end += len(record) if (fits := start + len(record) <= self._room) else 0
        if fits and self._written(record, start):
            self._starts[number], self._sizes[number] = start, len(record)

    def _written(self, record: bytes, start: int) -> bool:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.pwrite(self._file.fileno(), rest, start + len(record) - len(rest)) :]
        except OSError as error:  # the disk is full: what was written is good
            self._room = 0
            warn(f"decoded rows can't be cached any more, others are decoded in each epoch: {error.strerror}")
        return not rest


def _plain(array: np.ndarray) -> tuple[str, tuple[int, ...], memoryview]:
    return array.dtype.str, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
