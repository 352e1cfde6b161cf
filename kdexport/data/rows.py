"""Rows on disk: JSON lines, memory-mapped, and decoded on access.

Python objects of a million short texts take more than a gigabyte; their lines, mapped, take what the system can spare,
beside 17 bytes a row here. Decoding one takes about a microsecond.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import msgspec
import numpy as np

from kdexport.errors import RunError
from kdexport.tasks.metrics import Array

Row = dict[str, Any]

_FILES = {"image", "audio"}  # columns of paths
_BLOCK = 1 << 24  # bytes that are searched for ends of lines at once


class Rows(Sequence[Row]):
    """The rows of files, or some of them in any order; a copy of each on access.

    Paths of images and recordings are absolute, though relative to the file's folder on disk. Slices, `take` and `+`
    give further `Rows`; pickled, they are the files' names and the places of the rows.
    """

    def __init__(self, *files: Path) -> None:
        self._files = files
        self._texts = [_mapped(file) for file in files]
        spans = [_lines_of(text) for text in self._texts]
        self._of = np.repeat(np.arange(len(files), dtype=np.uint8), [len(starts) for starts, _ in spans])
        self._starts, self._ends = (
            np.concatenate([span[i] for span in spans] or [np.zeros(0, np.int64)]) for i in (0, 1)
        )

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Row | Rows:
        if isinstance(i, slice):
            return self.take(np.arange(*i.indices(len(self))))
        file = self._files[self._of[i]]
        try:
            row: Row = msgspec.json.decode(self.line(i))
        except msgspec.DecodeError as error:
            raise _unreadable(file, error) from None
        for column in _FILES & row.keys():
            row[column] = str(file.parent.absolute() / row[column])
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Rows) -> Rows:
        both = Rows.__new__(Rows)
        both._files, both._texts = (*self._files, *other._files), [*self._texts, *other._texts]
        both._of = np.concatenate([self._of, other._of + len(self._files)])
        both._starts = np.concatenate([self._starts, other._starts])
        both._ends = np.concatenate([self._ends, other._ends])
        return both

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_texts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_texts": [_mapped(file) for file in state["_files"]]}

    def take(self, places: Sequence[int] | Array) -> Rows:
        """Return the rows at these places, in their order."""
        some, chosen = Rows.__new__(Rows), np.asarray(places, dtype=np.int64)
        some._files, some._texts = self._files, self._texts
        some._of, some._starts, some._ends = (each[chosen] for each in (self._of, self._starts, self._ends))
        return some

    def where(self, wanted: Callable[[Row], object]) -> Rows:
        """Return the rows of which `wanted` is true."""
        return self.take(np.flatnonzero(np.fromiter((bool(wanted(row)) for row in self), bool, len(self))))

    def line(self, i: int) -> bytes:
        """Return a row as it stands in its file."""
        found: bytes = self._texts[self._of[i]][self._starts[i] : self._ends[i]]
        return found


def write_rows(folder: Path, name: str, rows: Iterable[Row], *, blob: str | None = None) -> Rows:
    """Write `<name>.jsonl`, and `<blob>.blob` with the rows' bytes values, which become `<blob>.blob#offset+length`.

    `blob` is `name` by default; a file of that name is continued. Paths to blobs of the run are relative to `folder`,
    so that a run can be moved.
    """
    place = folder / f"{blob or name}.blob"
    with (folder / f"{name}.jsonl").open("wb") as lines, place.open("ab") as bytes_of:
        for row in rows:
            for column in _FILES & row.keys():
                value = row[column]
                if isinstance(value, bytes):
                    row = row | {column: f"{place.name}#{bytes_of.tell()}+{len(value)}"}
                    bytes_of.write(value)
                elif ".blob#" in value:
                    row = row | {column: os.path.relpath(value, folder.absolute())}
            lines.write(msgspec.json.encode(row) + b"\n")
        empty = not bytes_of.tell()
    if empty:
        place.unlink()
    return Rows(folder / f"{name}.jsonl")


def copy_rows(folder: Path, name: str, rows: Rows) -> Rows:
    """Write rows of files in this folder as `<name>.jsonl`, unchanged."""
    with (folder / f"{name}.jsonl").open("wb") as lines:
        for i in range(len(rows)):
            lines.write(rows.line(i) + b"\n")
    return Rows(folder / f"{name}.jsonl")


def _mapped(file: Path) -> mmap.mmap | bytes:
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise _unreadable(file, error) from None


def _lines_of(text: mmap.mmap | bytes) -> tuple[Array, Array]:
    """Return where each line begins, and where it ends."""
    whole, found = np.frombuffer(text, np.uint8), []
    for start in range(0, len(whole), _BLOCK):
        found.append(np.flatnonzero(whole[start : start + _BLOCK] == ord("\n")) + start)
    ends = np.concatenate(found) if found else np.zeros(0, np.int64)
    return np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)], ends


def _unreadable(file: Path, error: Exception) -> RunError:
    return RunError(f"{file.parent}: its {file.stem} rows can't be read ({error})", "Run kdexport run again")
