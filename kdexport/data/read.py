"""Read a file's rows unchanged, with all columns, in order, independent of the command."""

import codecs
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kdexport.errors import DataError, MissingPackage, first_line
from kdexport.tasks.inputs.transcripts import normalised

_CONLL = {".conll", ".bio", ".iob2"}
SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"} | _CONLL
# JSON rows that determine the columns; Parquet rows converted together.
_PEEKED, AT_ONCE = 1000, 256
csv.field_size_limit(2**31 - 1)  # a field that is too long is a bad row, not a csv.Error

Raw = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows as read, iterable once; an unreadable row is replaced by the reason.

    Paths of images and recordings are relative to `folder`; a source of plain `lines` has only the column `text`.
    """

    name: str
    columns: list[str]
    rows: Iterable[Raw | str]
    folder: Path = Path()
    lines: bool = False


def read_file(path: Path, *, whole: bool = False) -> Source:
    """Open a CSV, TSV, JSON, JSONL, Parquet or CoNLL file; any other has a text per line, or is one `whole` text."""
    if not path.is_file():
        raise DataError(f"{path} {'is a folder' if path.exists() else 'does not exist'}", "Check the path")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    encoding = _encoding(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, encoding)
    if suffix in (".json", ".jsonl"):
        return _read_json(path, encoding)
    if suffix in _CONLL:
        return Source(path.name, ["tokens", "tags"], _conll_rows(path, _lines(path, encoding)))
    if whole:
        return Source(path.name, ["text"], [{"text": path.read_bytes().decode(encoding)}])
    return Source(path.name, ["text"], ({"text": line} for line in _lines(path, encoding)), lines=True)


def lines_of(path: Path) -> Iterator[str]:
    """Read the lines of a text file that is there and is not empty."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    return _lines(path, _encoding(path))


def read_lines(path: Path) -> list[str]:
    """Return the texts of a file of words or sentences, in normal form."""
    found = (normalised(str(row.get("text") or "")) for row in read_file(path).rows if isinstance(row, dict))
    if not (lines := [line for line in found if line]):
        raise DataError(f"{path} holds no words", "Write one a line, or in a column named text")
    return lines


def read_stream(stream: BinaryIO) -> Source:
    """Read a text per line from standard input, as it arrives."""

    def rows() -> Iterator[Raw]:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8("stdin", number, line[error.start]) from None
            yield {"text": text.rstrip("\r\n")}

    return Source("stdin", ["text"], rows(), lines=True)


def from_arrow(name: str, schema: Any, batches: Iterable[Any], folder: Path = Path()) -> Source:
    """Read Arrow batches of a schema; class numbers become the names in Hugging Face's schema metadata."""
    names = _classes_of(schema)

    def named(value: Any, known: list[str]) -> Any:
        if isinstance(value, list):
            return [named(one, known) for one in value]
        if not isinstance(value, int):  # None, and what is no number of a class
            return value
        return None if value < 0 else known[value]

    def rows() -> Iterator[Raw | str]:
        for row in (row for batch in batches for row in _of_batch(batch)):
            try:
                yield row | {column: named(row[column], known) for column, known in names.items()} if row else _NO_UTF8
            except IndexError:
                yield "it has a number of a class that has no name"

    return Source(name, list(schema.names), rows(), folder)


def _classes_of(schema: Any) -> dict[str, list[str]]:
    """Return column → names of its classes; empty where the metadata is not Hugging Face's."""
    try:
        features = msgspec.json.decode((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: found for column in schema.names if (found := _class_names(features.get(column)))}
    except (msgspec.DecodeError, AttributeError, KeyError, RecursionError, TypeError, UnicodeDecodeError):
        return {}


def _of_batch(batch: Any) -> list[Raw | None]:
    """Return the rows of an Arrow batch; None where one has a text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [None] if len(batch) == 1 else [row for i in range(len(batch)) for row in _of_batch(batch.slice(i, 1))]


def _class_names(feature: Any) -> list[str] | None:
    """Return the names of a ClassLabel, or of a list of them, in any of three historical formats."""
    if isinstance(feature, list):
        return _class_names(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") != "ClassLabel":
        return _class_names(feature.get("feature"))
    return names if isinstance(names := feature.get("names"), list) else None


def _read_parquet(path: Path) -> Source:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MissingPackage("pyarrow", "parquet") from None

    # Damage shows as pyarrow's errors, or as texts that are no UTF-8.
    damage = (pyarrow.ArrowException, OSError, ValueError)

    def unreadable(error: Exception) -> DataError:
        return DataError(f"{path} can't be read: {first_line(error)}")

    def readable(rows: Iterable[Raw | str]) -> Iterator[Raw | str]:
        try:
            yield from rows
        except damage as error:
            raise unreadable(error) from None

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        source = from_arrow(path.name, file.schema_arrow, file.iter_batches(AT_ONCE), path.parent)
    except damage as error:
        raise unreadable(error) from None
    return replace(source, rows=readable(source.rows))


def _read_csv(path: Path, encoding: str) -> Source:
    """Read a CSV or TSV file, without unnamed columns, such as the index that pandas writes."""
    with path.open(encoding=encoding, newline="") as file:
        first = file.readline()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",\t;", key=lambda mark: (mark in first, mark == ","))
    quoted = delimiter != "\t" or _is_quoted(path, encoding)
    records = _records(path, encoding, delimiter, csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    header = next(records, [])
    named = [name for name in header if name.strip()]
    if not named or len(set(named)) < len(named):
        raise DataError(f"{path}: its first row must name the columns, each once", f"It reads: {first.strip()[:80]}")

    def rows() -> Iterator[Raw | str]:
        for record in records:
            if any(record[len(header) :]):
                yield f"it has {len(record)} fields, and the header names {len(header)}"
            else:
                yield {name: value for name, value in zip(header, record, strict=False) if name.strip()}

    return Source(path.name, named, rows(), path.parent)


def _records(path: Path, encoding: str, delimiter: str, quoting: Any, strict: bool = False) -> Iterator[list[str]]:
    with path.open(encoding=encoding, newline="") as file:
        yield from filter(None, csv.reader(file, delimiter=delimiter, quoting=quoting, strict=strict))


def _is_quoted(path: Path, encoding: str) -> bool:
    """Return whether a TSV file quotes its fields, as pandas does; in GLUE's files quotes are text.

    Where all lines have the same number of tabs, each is a row, and its quotes must be balanced.
    """
    whole = len({line.count("\t") for line in _lines(path, encoding) if line}) == 1
    try:
        for line in _lines(path, encoding) if whole else ():
            next(csv.reader([line], delimiter="\t", strict=True), None)
        return whole or all(_records(path, encoding, "\t", csv.QUOTE_MINIMAL, strict=True))
    except csv.Error:
        return False


def _read_json(path: Path, encoding: str) -> Source:
    """Read an array of objects, or an object per line."""
    with path.open(encoding=encoding) as file:
        array = next((line for line in file if line.strip()), "").lstrip().startswith("[")
    if array:
        try:
            values = msgspec.json.decode(path.read_bytes().decode(encoding), type=list[Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"{path} can't be read: {error}") from None
        rows = iter([row if isinstance(row, dict) else _NO_OBJECT for row in values])
    else:
        rows = (_decoded(line) for line in _lines(path, encoding) if line.strip())
    some = list(islice(rows, _PEEKED))
    columns = dict.fromkeys(key for row in some if isinstance(row, dict) for key in row)
    return Source(path.name, list(columns), chain(some, rows), path.parent)


_NO_OBJECT, _NO_UTF8 = "it is no JSON object", "it has a text that is not UTF-8"


def _decoded(text: str) -> Raw | str:
    """Decode an object, or return the reason why not."""
    try:
        return msgspec.json.decode(text, type=Raw)
    except msgspec.ValidationError:
        return _NO_OBJECT
    except (msgspec.DecodeError, RecursionError) as error:
        return str(error)


def _conll_rows(path: Path, lines: Iterable[str]) -> Iterator[Raw]:
    """Read a word per line, its tag in the last column, a blank line between texts, as in CoNLL's shared tasks."""
    tokens, tags = list[str](), list[str]()
    for number, line in enumerate(chain(lines, [""]), 1):
        word, *more = line.split() or [""]
        if word not in ("", "-DOCSTART-"):
            if not more:
                raise DataError(f"{path}, line {number}: {word!r} has no tag", "Give word and tag in each line")
            tokens.append(word)
            tags.append(more[-1])
        elif tokens:
            yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """Read lines as editors number them; `str.splitlines` would also split at U+2028 and others within a text."""
    with path.open(encoding=encoding) as file:
        for line in file:
            yield line.rstrip("\n")


def _encoding(path: Path) -> str:
    """Detect UTF-16 by its byte-order mark, else UTF-8; every line is validated before any other work."""
    with path.open("rb") as file:
        head = file.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            try:
                for _ in _lines(path, "utf-16"):
                    pass
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is no valid UTF-16: {error.reason}", "Save it as UTF-8") from None
            return "utf-16"
        if b"\0" in head:
            raise DataError(f"{path} is UTF-16 without a byte-order mark, or no text", "Save it as UTF-8")
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, line[error.start]) from None
    return "utf-8-sig"


def _not_utf8(name: Path | str, number: int, byte: int) -> DataError:
    return DataError(
        f"{name}, line {number}: byte 0x{byte:02x} is not UTF-8",
        "Convert it from its encoding (latin1, gb18030, shift_jis, …), for example: iconv -f latin1 -t utf-8 OLD > NEW",
    )
