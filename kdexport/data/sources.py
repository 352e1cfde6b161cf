"""Files and hub ids → rows with the columns that the task wants; every bad row is named."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from kdexport import spec
from kdexport.data import folders
from kdexport.data.passages import Cut, read_text
from kdexport.errors import DataError, MissingPackage
from kdexport.tasks import task_class

TABLES = {".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll", ".bio", ".iob2"}
SUFFIXES = TABLES | {".txt"}
SPLITS = ("train", "validation", "test")

# Pairs of columns that need no flag, in order of preference; single ones stand in the tasks.
_OBVIOUS_PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("query", "passage"),
)  # fmt: skip


# What a row is called in its file, and the row.
Numbered = tuple[int | str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One split's file or hub split, as it was read: `rows` hold every column, in order."""

    name: str
    columns: list[str]
    rows: list[dict[str, Any]]
    folder: Path = Path()
    """What names of images and recordings are relative to."""


def find_splits(data: spec.Data) -> dict[str, str]:
    """Split → file or hub id, from the spec; a folder or a hub data set brings its own splits."""
    given = {split: getattr(data, split) for split in SPLITS}
    folder = Path(data.train)
    if folder.is_dir():
        names = {"validation": ("validation", "valid", "val", "dev"), "train": ("train",), "test": ("test",)}
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
        found = {s: str(p) for s in SPLITS for p in files if p.stem in names[s]}
        found = found if "train" in found else folders.splits_in(folder)
        if "train" not in found:
            raise DataError(
                f"{folder} holds no train.csv, .tsv, .jsonl, .parquet or .txt, nor images or recordings",
                "Name the file with --data",
            )
        given = found | {split: path for split, path in given.items() if path and split != "train"}
    return {split: path for split, path in given.items() if path}


def local_files(data: spec.Data) -> list[Path]:
    """The files whose content decides what the rows are; a missing one is an error.

    Raises:
        DataError: a file is missing or empty.
    """
    paths = [Path(source) for source in find_splits(data).values() if _is_file_name(source)]
    paths += [Path(data.unlabelled)] if data.unlabelled else []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist", "Check the path")
        if not path.is_file() and not folders.splits_in(path):
            raise DataError(f"{path} holds no images and no recordings", "Check the path")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
    return paths


def read_splits(data: spec.Data) -> dict[str, Source]:
    """Read every split that the spec names.

    Raises:
        DataError: a file can't be read; the line says where.
    """
    sources = find_splits(data)
    if not _is_file_name(sources["train"]):
        return _read_hub(sources)
    return {split: _read_local(Path(source)) for split, source in sources.items()}


def rows_of_sources(data: spec.Data) -> dict[str, int]:
    """How many rows, good and bad, the file of each split has, and that of the unlabelled texts (or lines)."""
    counts = {split: len(source.rows) for split, source in read_splits(data).items()}
    if data.unlabelled:
        path = Path(data.unlabelled)
        counts["unlabelled"] = len(read_file(path).rows if path.suffix in TABLES else _lines(path))
    return counts


def _read_local(path: Path) -> Source:
    """A file, or a folder of images or recordings, with the table that describes it or labels as subfolders."""
    if not path.is_dir():
        return read_file(path)
    if table := folders.metadata_of(path):
        return replace(read_file(table), name=f"{path.name}/{table.name}")
    return Source(path.name, ["file_name", "label"], folders.labelled_files(path), path)


def read_file(path: Path) -> Source:
    """Read a CSV, TSV, JSONL or Parquet file through Hugging Face `datasets`, as it stands; a text as one row."""
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is no {', '.join(sorted(SUFFIXES))} file", "Convert it, or rename it")
    if path.suffix in (".conll", ".bio", ".iob2"):
        return _read_conll(path)
    if path.suffix == ".txt":
        _check_utf8(path)
        return Source(path.name, ["text"], [{"text": read_text(path)}])
    datasets = _datasets()
    options: dict[str, Any] = {}
    if path.suffix in (".csv", ".tsv"):
        _check_utf8(path)
        delimiter, header = _sniff(path)
        strings = datasets.Features({column: datasets.Value("string") for column in header})
        options = {"sep": delimiter, "features": strings, "na_filter": False}
        reader = datasets.Dataset.from_csv
    elif path.suffix == ".parquet":
        reader = datasets.Dataset.from_parquet
    else:
        _check_utf8(path)
        reader = datasets.Dataset.from_json
    try:
        with tempfile.TemporaryDirectory() as cache:  # the run folder keeps what is read; no second copy
            table = reader(str(path), cache_dir=cache, keep_in_memory=True, **options)
            return replace(_to_source(path.name, table), folder=path.parent)
    except Exception as error:  # `datasets` wraps the parsers' errors in several classes of its own
        cause = error.__cause__ or error
        raise DataError(f"{path} can't be read: {str(cause).strip().splitlines()[-1]}") from None


def to_rows(
    source: Source, data: spec.Data, task: str, *, needs_labels: bool = True, cut: Cut | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Choose the columns and check every row.

    Args:
        source: as it was read.
        data: which columns, and what is done with bad rows.
        task: its name.
        needs_labels: whether a file without a column of labels is an error; else its rows have the label None. Where
            there is such a column, or the spec names one, every row needs its label.
        cut: how a text becomes passages, each a row of its own, with the id `<file>:<row>.<passage>`.

    Returns:
        The good rows with a stable id `<file>:<row>`, rows counted from 1; and the number of bad ones.

    Raises:
        DataError: a column or, unless `skip_bad_rows`, a row is wrong.
    """
    columns = _choose_columns(source, data, task, needs_labels or data.label is not None)
    return _check_rows(source, _numbered(source.rows, columns, cut), columns, data, task)


def read_unlabelled(data: spec.Data, task: str, cut: Cut | None = None) -> tuple[list[dict[str, Any]], int]:
    """The rows of `data.unlabelled`, with the label None; and the number of bad ones. See `to_rows`.

    A file that is no CSV, TSV, JSONL or Parquet file is a text a line; its blank lines are passed over. A column of
    labels is not read.

    Raises:
        DataError: the file, a column or, unless `skip_bad_rows`, a row is wrong.
    """
    assert data.unlabelled
    path = Path(data.unlabelled)
    if path.suffix in TABLES or cut:
        source = read_file(path)
        columns = _choose_columns(source, msgspec.structs.replace(data, label=None), task, needs_label=False)
        columns.pop("label", None)
        return _check_rows(source, _numbered(source.rows, columns, cut), columns, data, task)
    if task_class(task).modality != "text":
        raise DataError(f"{path} names no files", "Give a CSV, JSONL or Parquet file")
    if data.text_pair:
        raise DataError(f"{path} holds single texts, the data are pairs of them", "Give a CSV or JSONL of pairs")
    _check_utf8(path)
    texts = [(number, {"text": line}) for number, line in enumerate(_lines(path), 1) if line.strip()]
    return _check_rows(Source(path.name, ["text"], []), texts, {"text": "text"}, data, task)


def _lines(path: Path) -> list[str]:
    """As editors number them: str.splitlines would end lines within a text too, at U+2028 and its kind."""
    with path.open(encoding="utf-8-sig") as file:
        return [line.rstrip("\n") for line in file]


def _numbered(rows: list[dict[str, Any]], columns: dict[str, str], cut: Cut | None) -> Iterator[Numbered]:
    """Rows from 1 on; of texts that are cut, the i-th passage of row 7 is 7.i."""
    for number, row in enumerate(rows, 1):
        text = row.get(columns.get("text", ""))
        if cut and isinstance(text, str) and text.strip():
            yield from ((f"{number}.{i}", row | {columns["text"]: part}) for i, part in enumerate(cut(text), 1))
        else:
            yield number, row


def _check_rows(
    source: Source, numbered: Iterable[Numbered], columns: dict[str, str], data: spec.Data, task: str
) -> tuple[list[dict[str, Any]], int]:
    rows, bad, of_task, name = [], 0, task_class(task, data.problem), source.name
    for number, raw in numbered:
        row = {column: raw.get(column_there) for column, column_there in columns.items()}
        if of_task.modality != "text":
            row[of_task.modality] = _placed(row[of_task.modality], source.folder)
        label = row.pop("label", None)
        ready = of_task.canonical(row | {"label": label})
        problem = ready if isinstance(ready, str) else of_task.check(ready, data.max_chars, "label" in columns)
        if problem is None and not isinstance(ready, str):
            rows.append({"id": f"{name}:{number}"} | ready)
        elif data.skip_bad_rows:
            bad += 1
        else:
            raise DataError(
                f"{name}, row {number}: {problem}",
                "Mend the row, or leave such rows out: --skip-bad-rows",
            )
    if not rows:
        raise DataError(f"{name}: none of its {bad} rows can be used" if bad else f"{name} holds no rows")
    return rows, bad


def _placed(value: Any, folder: Path) -> Any:
    """What a column of images or recordings names: a path, absolute; or bytes."""
    if isinstance(value, dict):  # as Hugging Face's data sets have it
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return str(folder.absolute() / value) if isinstance(value, str) and value else value


def _choose_columns(source: Source, data: spec.Data, task: str, needs_label: bool) -> dict[str, str]:
    """Our column → the file's: as named in the spec, else guessed when obvious."""
    reads = task_class(task).modality
    named = {reads: data.text, "text_pair": data.text_pair, "label": data.label}
    for name in filter(None, named.values()):
        if name not in source.columns:
            raise DataError(f"{source.name} has no column {name!r}", f"Its columns: {', '.join(source.columns)}")
    if data.text is None and data.text_pair is None and task_class(task).pairs:
        pair = next((p for p in _OBVIOUS_PAIRS if set(p) <= set(source.columns)), None)
        if pair:
            named["text"], named["text_pair"] = pair
    for wanted, names in task_class(task).columns.items():
        if named[wanted] is None:
            named[wanted] = next((n for n in names if n in source.columns), None)
        if named[wanted] is None and (wanted != "label" or needs_label):
            raise DataError(
                f"{source.name}: which column is the {wanted}?",
                f"Name it with --{'text' if wanted == reads else wanted}. Its columns: {', '.join(source.columns)}",
            )
    return {ours: theirs for ours, theirs in named.items() if theirs}


def _read_hub(sources: dict[str, str]) -> dict[str, Source]:
    """Read a hub data set `name` or `name:config`; its own splits fill those that the spec does not name."""
    datasets = _datasets()
    name, _, config = sources["train"].partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # connection, missing id, missing config: many classes, one meaning
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"no file and no data set on the hub: {sources['train']!r} ({reason})") from None
    if "train" not in splits:
        raise DataError(f"hub data set {name!r} has no train split", f"Its splits: {', '.join(splits)}")
    found = {split: _to_source(f"{name}/{split}", splits[split]) for split in SPLITS if split in splits}
    named = {split: read_file(Path(path)) for split, path in sources.items() if split != "train"}
    return found | named


def _to_source(name: str, table: Any) -> Source:
    for column, feature in table.features.items():
        if type(feature).__name__ in ("Image", "Audio"):  # the bytes as they are; we decode them ourselves
            table = table.cast_column(column, type(feature)(decode=False))
    rows = table.to_list()
    for column, feature in table.features.items():
        if hasattr(feature, "int2str"):  # a ClassLabel: numbers that stand for names
            for row in rows:
                value = row[column]
                row[column] = None if value is None or value < 0 else feature.int2str(value)
        elif hasattr(getattr(feature, "feature", None), "int2str"):  # lists of them
            for row in rows:
                row[column] = row[column] and feature.feature.int2str(row[column])
    return Source(name, list(table.column_names), rows)


def _read_conll(path: Path) -> Source:
    """A word a line, its tag in the last column, a blank line between texts; as CoNLL's shared tasks have it."""
    _check_utf8(path)
    rows: list[dict[str, Any]] = [{"tokens": [], "tags": []}]
    for number, line in enumerate(_lines(path), 1):
        word, *more = line.split()[:1] + line.split()[1:][-1:] or [""]
        if word in ("", "-DOCSTART-"):
            rows += [{"tokens": [], "tags": []}] if rows[-1]["tokens"] else []
        elif not more:
            raise DataError(f"{path}, line {number}: {line.strip()!r} has no tag", "Give word and tag in each line")
        else:
            rows[-1]["tokens"].append(word)
            rows[-1]["tags"].append(more[0])
    return Source(path.name, ["tokens", "tags"], [row for row in rows if row["tokens"]])


def _sniff(path: Path) -> tuple[str, list[str]]:
    """The delimiter and the header of a CSV file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        delimiter = "\t" if path.suffix == ".tsv" or ("\t" in first and "," not in first) else ","
        if delimiter == "," and ";" in first and "," not in first:
            delimiter = ";"
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        header, first_row = next(reader, []), next(reader, None)
    if not header or len(set(header)) < len(header):
        raise DataError(f"{path}: its first row must name the columns, each once", f"It reads: {first.strip()[:80]}")
    if first_row is None:
        raise DataError(f"{path} holds no rows")
    return delimiter, header


def _check_utf8(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8",
                    f"Convert it, for example: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
                ) from None


def _is_file_name(source: str) -> bool:
    return Path(source).suffix in SUFFIXES or Path(source).exists() or source.startswith(("/", "./", "../"))


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingPackage("datasets", "distill") from None
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets


def iter_texts(path: Path | None, stdin: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows for `kdexport predict`, without `datasets`: JSONL or CSV with their columns, else a text a line."""
    if path is None:
        yield from ({"text": line.rstrip("\n")} for line in stdin)
        return
    if not path.is_file():
        raise DataError(f"{path} does not exist", "Check the path")
    if path.suffix in (".csv", ".tsv", ".jsonl", ".txt"):
        _check_utf8(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.MsgspecError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            yield row
    elif path.suffix in (".csv", ".tsv"):
        delimiter, _ = _sniff(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=delimiter)
    else:
        yield from ({"text": line} for line in path.read_text(encoding="utf-8").splitlines())


def rows_with_texts(path: Path, column: str = "text") -> list[dict[str, Any]]:
    """The rows of a file whose `text` is not empty, with all their columns; labels are not needed.

    Args:
        path: CSV, TSV, JSONL or a text a line.
        column: what is called `text` in the rows.

    Raises:
        DataError: the file holds no texts, or in a row something else.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder", "Name a CSV, TSV, JSONL or text file")
    rows = []
    for number, row in enumerate(iter_texts(path, []), 1):
        if column not in row:
            raise DataError(f"{path} has no column {column!r}", f"Its columns: {', '.join(map(str, row))}")
        if not isinstance(row[column], str):
            raise DataError(f"{path}, row {number}: {column} is no text but {type(row[column]).__name__}", "Mend it")
        if row[column].strip():
            rows.append(row | {"text": row[column]})
    if not rows:
        raise DataError(f"{path} holds no texts", "It wants a column 'text', or a text a line")
    return rows
