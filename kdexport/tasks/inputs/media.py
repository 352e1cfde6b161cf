"""Rows of images and recordings: a path, `PATH#OFFSET+LENGTH` for a part of a file, `data:;base64,…`, or bytes.

Rows are decoded lazily: 60,000 images as float32 would exceed most machines' memory.
"""

import base64
import hashlib
import importlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from kdexport.errors import DataError, MissingPackage
from kdexport.tasks.base import Task
from kdexport.tasks.config import Arrays, Row, TaskConfig, read_config
from kdexport.tasks.inputs.cache import Cache, memory_for_cache
from kdexport.tasks.metrics import Array

_PART = re.compile(r"(.+)#(\d+)\+(\d+)", re.DOTALL)
_INLINE = "data:;base64,"
# Size limits of one file, and of all that are decoded concurrently, in bytes.
_MOST_BYTES, _MOST_DECODED = 100_000_000, 400_000_000
_SMALL = 4_000_000
# The files that are looked at to tell images from recordings.
_SHOWING = 3


def bytes_of(value: object) -> bytes:
    """Return the bytes of a row's value, which may be a path."""
    match value:
        case bytes():
            return value
        case str() if value.startswith(_INLINE):
            return inline_bytes(value)
        case str():
            path, offset, length = found.groups() if (found := _PART.fullmatch(value)) else (value, 0, None)
            try:
                status = Path(path).stat()
                if not stat.S_ISREG(status.st_mode):  # a pipe or a device may block, or never end
                    raise DataError(f"{value} is no file")
                size = status.st_size if length is None else int(length)
                if size > _MOST_BYTES:
                    raise DataError(f"{value} has {size:,} bytes; at most {_MOST_BYTES:,} are read")
                with Path(path).open("rb") as file:
                    file.seek(int(offset))
                    return file.read(size)
            except (OSError, ValueError, OverflowError) as error:
                raise DataError(f"{value} can't be read: {getattr(error, 'strerror', None) or error}") from None
    raise DataError(f"it is neither a path nor bytes but {type(value).__name__}")


def inline_bytes(value: object) -> bytes:
    """Decode a `data:;base64,…` value and never open a file: for untrusted rows."""
    if not isinstance(value, str) or not value.startswith(_INLINE):
        raise DataError(f"it does not begin with {_INLINE}")
    try:
        return base64.b64decode(value.removeprefix(_INLINE), validate=True)
    except ValueError:
        raise DataError("it is no base64") from None


def inline(content: bytes) -> str:
    """Encode bytes as a `data:;base64,…` value, for JSON."""
    return _INLINE + base64.b64encode(content).decode()


@cache
def installed(module: str, package: str) -> Any:
    """Import an optional library for images or sound."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise MissingPackage(package, "cpu") from None


class Decoding:
    """A memory budget for decoding, shared by all threads."""

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._turn, self._freed = threading.Lock(), threading.Condition()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes, waiting if necessary; small sizes are free, as a thread decodes one row at a time."""
        if size < _SMALL:
            yield
            return
        size = min(size, self._most)
        with self._turn, self._freed:  # one waits at a time, so that large ones don't starve
            self._freed.wait_for(lambda: self._used + size <= self._most)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify()


DECODING = Decoding(_MOST_DECODED)


class Encoded(Sequence[Arrays]):
    """Rows that are encoded on access, in training by several threads and with a cache.

    `encode` returns the compact arrays of a row, which are cached, and `finish` those that are read.
    """

    threads = 1

    def __init__(
        self,
        rows: Sequence[Row],
        encode: Callable[[Row], Arrays],
        finish: Callable[[Arrays], Arrays] | None = None,
    ) -> None:
        self.rows, self._encode, self._finish = rows, encode, finish
        self.cache: Cache | None = None
        self.first = 0  # the cache's number of the first row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Arrays:  # type: ignore[override] # no slices
        arrays = self.cache.get(self.first + i) if self.cache else None
        if arrays is None:
            arrays = self._encode(self.rows[i])
            if self.cache:
                self.cache.put(self.first + i, arrays)
        return self._finish(arrays) if self._finish else arrays

    def take(self, chosen: Sequence[int]) -> list[Arrays]:
        """Return some rows, decoded by several threads."""
        new = sum(not self.cache or self.first + i not in self.cache for i in chosen)
        if min(self.threads, new) < 2:
            return [self[i] for i in chosen]
        parts = [chosen[i :: self.threads] for i in range(self.threads)]
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(lambda part: [self[i] for i in part], parts))
        return [found[i % self.threads][i // self.threads] for i in range(len(chosen))]


@contextmanager
def cached(folder: Path, *sequences: Sequence[Arrays]) -> Iterator[None]:
    """Cache rows within the context, in memory and in a file in the folder, so that each is decoded once."""
    decoding = [each for each in sequences if isinstance(each, Encoded)]
    if not decoding:
        yield
        return
    with Cache(folder, memory_for_cache()) as cache:
        for each in decoding:
            each.cache, each.first = cache, cache.claim(len(each))
        try:
            yield
        finally:
            for each in decoding:
                each.cache = None


def taken(encoded: Sequence[Arrays], chosen: Sequence[int]) -> list[Arrays]:
    """Return some encoded rows."""
    return encoded.take(chosen) if isinstance(encoded, Encoded) else [encoded[i] for i in chosen]


class Media(Task):
    """The input side of tasks with rows `{"image": …}` or `{"audio": …}`; all rows have arrays of one shape."""

    files: ClassVar[str]  # the word for them
    _how: Any

    def __init__(self, config: TaskConfig) -> None:
        self.config, self.labels = config, config.labels
        self._how = getattr(config, self.modality)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(read_config(folder))

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        for row in rows[:_SHOWING]:
            try:
                cls.inspect(bytes_of(row[cls.modality]))
                return f"there are {cls.files}"
            except DataError:
                continue
        return ""

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        value = row.get(cls.modality)
        if value is None or value == "":
            return f"{cls.modality} is missing"
        if isinstance(value, str) and (name := os.fsencode(value).decode("utf-8", "backslashreplace")) != value:
            return f"its {cls.modality} {name} has a name that is not UTF-8"
        try:
            content = bytes_of(value)
            cls.inspect(content)
        except DataError as error:
            named = f" {value}" if isinstance(value, str) and value not in error.what else ""
            return f"its {cls.modality}{named} {error.what.removeprefix('it ')}"
        return super().canonical(row | {"sha256": hashlib.sha256(content).hexdigest()})

    @classmethod
    def inspect(cls, content: bytes) -> None:
        """Check that the content can be decoded."""
        raise NotImplementedError

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        return "label is empty" if needs_label and row.get("label") in (None, "") else None

    @classmethod
    def content(cls, row: Row) -> str:
        return str(row.get("sha256") or hashlib.sha256(bytes_of(row[cls.modality])).hexdigest())

    @classmethod
    def title(cls, row: Row) -> str:
        value = row[cls.modality]
        return str(row["id"]) if _PART.fullmatch(str(value)) else Path(str(value)).name

    @classmethod
    def row(cls, given: object) -> dict[str, Any]:
        value = str(given) if isinstance(given, Path) else given
        cls.inspect(bytes_of(value))
        return {cls.modality: value}

    def compact(self, content: bytes) -> Array:
        """Return what `expand` makes a row's input of the graph from, in the fewest bytes."""
        raise NotImplementedError

    def expand(self, compact: Array) -> Array:
        """Return a row's input of the graph, float32, without the batch axis."""
        return compact

    def array(self, content: bytes) -> Array:
        """Return a row's input of the graph, float32, without the batch axis."""
        return self.expand(self.compact(content))

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        name = self.config.inputs[0]
        return Encoded(rows, lambda row: {name: self._compact(row)}, lambda arrays: {name: self.expand(arrays[name])})

    def _compact(self, row: Row) -> Array:
        try:
            return self.compact(bytes_of(row[self.modality]))
        except DataError as error:
            if "id" not in row:
                raise
            raise DataError(f"{row['id']}: its {self.modality} {error.what.removeprefix('it ')}", error.fix) from None

    def shapes(self) -> dict[str, list[int]]:
        """Return the shape of each input, float32; −1 is any size."""
        raise NotImplementedError

    def windows(self, row: Row) -> int:
        """Return how many of the graph's inputs a row fills, from its header."""
        return 1

    def seconds(self, row: Row) -> float:
        """Estimate the CPU seconds for decoding a row, from its header."""
        raise NotImplementedError
