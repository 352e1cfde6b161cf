"""What pictures and sound have in common: a row names a file, a part of one, or the bytes themselves.

A row's value is a path, `PATH#OFFSET+LENGTH` for a part of a file, `data:;base64,…`, or bytes. Rows are decoded when
they are asked for, one by one: 60,000 pictures as float32 would fill the memory of most machines.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import numpy as np

from kdexport.errors import DataError
from kdexport.tasks.config import Arrays, Comparable, Row, TaskConfig, read_config
from kdexport.tasks.metrics import Array

_PART = re.compile(r"(.+)#(\d+)\+(\d+)", re.DOTALL)
_INLINE = "data:;base64,"


def bytes_of(value: object) -> bytes:
    """The bytes that a row's value names.

    Raises:
        DataError: there is no such file, or the value names none.
    """
    match value:
        case bytes():
            return value
        case str() if value.startswith(_INLINE):
            return base64.b64decode(value.removeprefix(_INLINE))
        case str():
            path, offset, length = found.groups() if (found := _PART.fullmatch(value)) else (value, 0, -1)
            try:
                with Path(path).open("rb") as file:
                    file.seek(int(offset))
                    return file.read(int(length))
            except (OSError, ValueError) as error:
                raise DataError(f"{value} can't be read: {getattr(error, 'strerror', None) or error}") from None
    raise DataError(f"it names no file and is no bytes but {type(value).__name__}")


def inline(content: bytes) -> str:
    """Bytes as a value of a row that can be written as JSON."""
    return _INLINE + base64.b64encode(content).decode()


class Encoded(Sequence[Arrays]):
    """Rows that are encoded when they are asked for."""

    def __init__(self, rows: Sequence[Row], encode: Callable[[Row], Arrays]) -> None:
        self._rows, self._encode = rows, encode

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Arrays: ...
    @overload
    def __getitem__(self, i: slice) -> Encoded: ...
    def __getitem__(self, i: int | slice) -> Arrays | Encoded:
        return Encoded(self._rows[i], self._encode) if isinstance(i, slice) else self._encode(self._rows[i])


class Media(Comparable):
    """The side of a task that reads rows `{"image": …}` or `{"audio": …}`; all inputs of a graph are of one size."""

    output: ClassVar = "logits"
    reads: ClassVar[str]
    at_once: ClassVar = 32
    config: TaskConfig

    def __init__(self, config: TaskConfig) -> None:
        self.config, self.labels = config, config.labels

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open the task of a model folder (`task.json`) or an artifact (`kdexport.json`).

        Raises:
            ArtifactError: there is none.
        """
        return cls(read_config(folder))

    # --- rows as they come

    @classmethod
    def taken(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        """A row with the sha256 of its content, after that was decoded; or what is wrong with it."""
        value = row.get(cls.reads)
        if value is None or value == "":
            return f"{cls.reads} is missing"
        try:
            content = bytes_of(value)
            cls.inspect(content)
        except DataError as error:
            named = f" {value}" if isinstance(value, str) and value not in error.what else ""
            return f"its {cls.reads}{named} {error.what.removeprefix('it ')}"
        return row | {"sha256": hashlib.sha256(content).hexdigest()}

    @classmethod
    def inspect(cls, content: bytes) -> object:
        """Decode the content, to see that it can be."""
        raise NotImplementedError

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        """What else is wrong with a row that was taken, or None."""
        return "label is empty" if needs_label and row.get("label") in (None, "") else None

    @classmethod
    def content(cls, row: Row) -> str:
        """What a model sees of a row; rows with equal content get equal logits."""
        return str(row.get("sha256") or hashlib.sha256(bytes_of(row[cls.reads])).hexdigest())

    @classmethod
    def title(cls, row: Row) -> str:
        """What a row is called in reports."""
        value = row[cls.reads]
        return str(row["id"]) if _PART.fullmatch(str(value)) else Path(str(value)).name

    @staticmethod
    def ready(row: dict[str, Any]) -> dict[str, Any]:
        """A row as the task reads it."""
        return row

    @classmethod
    def row(cls, given: object) -> dict[str, Any]:
        """The row of what a caller wants answered: a path or bytes.

        Raises:
            DataError: it is something else, or is no picture or sound.
        """
        value = str(given) if isinstance(given, Path) else given
        cls.inspect(bytes_of(value))
        return {cls.reads: value}

    # --- rows → arrays

    def array(self, content: bytes) -> Array:
        """The graph's input of one row, float32, without the batch's axis."""
        raise NotImplementedError

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        """The graph's input of each row, made when it is asked for."""
        name = self.config.inputs[0]
        return Encoded(rows, lambda row: {name: self.array(bytes_of(row[self.reads]))})

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """The batch of encoded rows; all are of one size."""
        return {name: np.stack([arrays[name] for arrays in encoded]) for name in self.config.inputs}

    def encode(self, rows: Sequence[Row]) -> Arrays:
        """The graph's input for a batch of rows."""
        if len(rows) == 1:  # nothing to put side by side; a single row is what latency is measured by
            return {self.config.inputs[0]: self.array(bytes_of(rows[0][self.reads]))[np.newaxis]}
        return self.collate(list(self.tokenize(rows)))

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        """What to sort batches by: nothing."""
        return [1] * len(encoded)

    def graph_inputs(self, arrays: Arrays) -> Arrays:
        """What the graph reads of an encoded batch."""
        return arrays

    def pick(self, output: Array, arrays: Arrays) -> Array:
        """The graph's output for an encoded batch → logits [B, C]."""
        return output

    def shapes(self) -> dict[str, list[int]]:
        """The graph's inputs as clients may send them, float32; −1 is any size."""
        raise NotImplementedError

    def cost(self, row: Row) -> int:
        """One: all rows take the same time."""
        return 1

    def lengths(self) -> list[int]:
        """There is one length only, so none is worth measuring."""
        return []

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """The graph's input of one row."""
        return self.encode(rows[:1])
