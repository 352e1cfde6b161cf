"""Files, folders and hub ids → rows with the columns that the task wants; every bad row is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kdexport import spec
from kdexport.data import folders
from kdexport.data.passages import Cut
from kdexport.data.read import SUFFIXES, Raw, Source, from_arrow, read_file
from kdexport.errors import DataError, MissingPackage
from kdexport.files import is_place
from kdexport.progress import say
from kdexport.tasks import Task

SPLITS = ("train", "validation", "test")

# Pairs of columns that need no flag, in order of preference; single ones stand in the tasks.
_OBVIOUS_PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("query", "passage"),
)  # fmt: skip

# Whether rows have labels: all; all, if there is a column of them; some; or nobody asks.
Labels = Literal["all", "if any", "some", "none"]
# Our column → the file's.
Columns = dict[str, str]
Rows = list[dict[str, Any]]
# What a row is called in its file, and the row.
Numbered = Iterable[tuple[int | str, Raw | str]]


def find_splits(data: spec.Data) -> dict[str, str]:
    """Split → file or hub id, from the spec; a folder or a hub data set brings its own splits."""
    given = {split: getattr(data, split) for split in SPLITS}
    folder = Path(data.train)
    if folder.is_dir():
        names = {"validation": ("validation", "valid", "val", "dev"), "train": ("train",), "test": ("test",)}
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        found = {s: str(p) for s in SPLITS for p in files if p.stem in names[s]}
        found = found if "train" in found else folders.splits_in(folder)
        if "train" not in found:
            raise DataError(
                f"{folder} holds no train.csv, .tsv, .jsonl, .parquet or .txt, nor images or WAV files",
                "Name the file with --data",
            )
        given = found | {split: path for split, path in given.items() if path and split != "train"}
    return {split: path for split, path in given.items() if path}


def local_files(data: spec.Data) -> list[Path]:
    """The files whose content decides what the rows are; a missing one is an error.

    Raises:
        DataError: a file is missing or empty.
    """
    paths = [Path(source) for source in find_splits(data).values() if _is_local(source)]
    paths += [Path(data.unlabelled)] if data.unlabelled else []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist", "Check the path")
        if not path.is_file() and not folders.splits_in(path):
            raise DataError(f"{path} holds no images and no WAV files", "Check the path")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
    return paths


def read_splits(data: spec.Data, *, whole: bool = False) -> dict[str, Source]:
    """Open every split that the spec names, text files as `whole` texts or a text a line.

    Raises:
        DataError: a file can't be read; the line says where.
    """
    sources = find_splits(data)
    if not _is_local(sources["train"]):
        return _read_hub(sources)
    return {split: _read_local(Path(source), whole) for split, source in sources.items()}


def read_test(data: spec.Data) -> Source:
    """Open what `data.train` names: a file, or a folder or a hub data set, of which the test split is taken if any.

    Raises:
        DataError: it can't be read.
    """
    splits = read_splits(data)
    split = "test" if "test" in splits else "train"
    if len(splits) > 1:
        say(f"data: of {data.train} the {split} split is taken")
    return splits[split]


def rows_of_sources(data: spec.Data) -> dict[str, int]:
    """How many rows, good and bad, the file of each split has, and that of the unlabelled texts (or lines)."""
    sources = read_splits(data) | ({"unlabelled": read_file(Path(data.unlabelled))} if data.unlabelled else {})
    return {split: sum(1 for _ in source.rows) for split, source in sources.items()}


def to_rows(
    source: Source, data: spec.Data, task: type[Task], labels: Labels = "all", cut: Cut | None = None,
    known: Mapping[str, str] | None = None,
) -> tuple[Rows, int]:  # fmt: skip
    """Choose the columns and check every row.

    Args:
        source: as it was read.
        data: which columns, and what is done with bad rows.
        task: what the rows are for.
        labels: which rows must have one; those without have the label None.
        cut: how a text becomes passages, each a row of its own, with the id `<file>:<row>.<passage>`.
        known: the columns of the rows that a model was trained on.

    Returns:
        The good rows with a stable id `<file>:<row>`, rows counted from 1; and the number of bad ones.

    Raises:
        DataError: a column or, unless `skip_bad_rows`, a row is wrong.
    """
    columns = choose_columns(source, data, task, labels, known)
    needed = "label" in columns and labels != "some"

    def take(raw: Raw) -> Raw:
        row = {ours: raw.get(theirs) for ours, theirs in columns.items()}
        row[task.modality] = _placed(row[task.modality], task, source)
        label = row.pop("label", None)
        ready = task.canonical(row | {"label": label if needed or label != "" else None})
        problem = ready if isinstance(ready, str) else task.check(ready, data.max_chars, needed)
        if problem or isinstance(ready, str):
            raise DataError(problem or "")
        return ready

    found = list(_checked(source, _numbered(source, columns, cut), data, take))
    rows = [row for row in found if row is not None]
    bad = len(found) - len(rows)
    if not rows:
        raise DataError(f"{source.name}: none of its {bad} rows can be used" if bad else f"{source.name} holds no rows")
    return rows, bad


def to_answer(source: Source, data: spec.Data, task: Task, known: Mapping[str, str]) -> Iterator[dict[str, Any] | None]:
    """Rows one by one: their `id`, what is `asked`, and the `row` that the task reads; None for a bad one.

    A text may be empty: it is answered like any other.

    Raises:
        DataError: a column or, unless `skip_bad_rows`, a row is wrong.
    """
    columns = choose_columns(source, data, type(task), "none", known)

    def take(raw: Raw) -> Raw:
        given = raw.get(columns[task.modality])
        given = given if source.lines else _placed(given, task, source)
        second = raw.get(columns.get("text_pair", ""))
        for text in (given, second) if task.modality == "text" else ():
            if isinstance(text, str) and len(text) > data.max_chars:
                raise DataError(f"the text has {len(text):,} characters (a quote left open?)")
        asked = (given, second) if second else given
        return {"asked": asked, "row": task.row(asked)}

    return _checked(source, enumerate(source.rows, 1), data, take)


def read_unlabelled(data: spec.Data, task: type[Task], cut: Cut | None = None) -> tuple[Rows, int]:
    """The rows of `data.unlabelled`, with the label None; and the number of bad ones. See `to_rows`."""
    source = read_file(Path(data.unlabelled or ""), whole=cut is not None)
    return to_rows(source, data, task, "none", cut)


def choose_columns(
    source: Source, data: spec.Data, task: type[Task], labels: Labels = "all", known: Mapping[str, str] | None = None
) -> Columns:
    """Our column → the file's: as named in the spec, else as `known`, else guessed where that is obvious.

    Raises:
        DataError: there is no such column, or it can't be guessed.
    """
    reads, there = task.modality, source.columns
    if source.lines:
        if data.text_pair:
            raise DataError(f"{source.name} holds single texts, the data are pairs of them", "Give a file of columns")
        return {reads: "text"}
    named = {reads: data.text, "text_pair": data.text_pair, "label": None if labels == "none" else data.label}
    for name in filter(None, named.values()):
        if name not in there:
            raise DataError(f"{source.name} has no column {name!r}", f"Its columns: {', '.join(there)}")
    if not (data.text or data.text_pair):
        texts = {ours: theirs for ours, theirs in (known or {}).items() if ours != "label"}
        if texts and set(texts.values()) <= set(there):
            named |= texts
        elif task.name == "text-classification":
            pair = next((p for p in _OBVIOUS_PAIRS if set(p) <= set(there)), (None, None))
            named["text"], named["text_pair"] = pair
    for wanted, names in task.columns.items():
        if wanted == "label" and labels == "none":
            continue
        if named[wanted] is None:
            candidates = ((known or {}).get(wanted), *names)
            named[wanted] = next((name for name in candidates if name in there), None)
        needed = wanted != "label" or labels == "all" or data.label
        if named[wanted] is None and needed:
            raise DataError(
                f"{source.name}: which column is the {wanted}?",
                f"Name it with --{'text' if wanted == reads else wanted}. Its columns: {', '.join(there)}",
            )
    return {ours: theirs for ours, theirs in named.items() if theirs}


def _numbered(source: Source, columns: Columns, cut: Cut | None) -> Numbered:
    """Rows from 1 on; of texts that are cut, the i-th passage of row 7 is 7.i. Blank lines are no rows."""
    for number, row in enumerate(source.rows, 1):
        text = row.get(columns.get("text", "")) if isinstance(row, dict) else None
        if cut and isinstance(row, dict) and isinstance(text, str) and text.strip():
            yield from ((f"{number}.{i}", row | {columns["text"]: part}) for i, part in enumerate(cut(text), 1))
        elif not source.lines or str(text).strip():
            yield number, row


def _checked(
    source: Source, numbered: Numbered, data: spec.Data, take: Callable[[Raw], Raw]
) -> Iterator[dict[str, Any] | None]:
    """What `take` makes of each row, with its id; None for a bad row, which is an error unless `skip_bad_rows`."""
    for number, raw in numbered:
        try:
            if isinstance(raw, str):
                raise DataError(raw)
            taken = take(raw)
        except DataError as error:
            if not data.skip_bad_rows:
                fix = "Mend the row, or leave such rows out: --skip-bad-rows"
                raise DataError(f"{source.name}, row {number}: {error.what}", fix) from None
            yield None
        else:
            yield {"id": f"{source.name}:{number}"} | taken


def _placed(value: Any, task: Task | type[Task], source: Source) -> Any:
    """What a column of images or recordings names: a path, absolute; or bytes. Texts are as they are."""
    if task.modality == "text":
        return value
    if isinstance(value, dict):  # as Hugging Face's data sets have it
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return str(source.folder.absolute() / value) if isinstance(value, str) and value else value


def _is_local(source: str) -> bool:
    return Path(source).suffix.lower() in SUFFIXES or is_place(source)


def _read_local(path: Path, whole: bool) -> Source:
    """A file, or a folder of images or recordings, with the table that describes it or labels as subfolders."""
    if not path.is_dir():
        return read_file(path, whole=whole)
    if table := folders.metadata_of(path):
        return replace(read_file(table), name=f"{path.name}/{table.name}")
    return Source(path.name, ["file_name", "label"], folders.labelled_files(path), path)


def _read_hub(sources: dict[str, str]) -> dict[str, Source]:
    """Read a hub data set `name` or `name:config`; its own splits fill those that the spec does not name."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingPackage("datasets", "distill") from None
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    name, _, config = sources["train"].partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # connection, missing id, missing config: many classes, one meaning
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"no file and no data set on the hub: {sources['train']!r} ({reason})") from None
    if "train" not in splits:
        raise DataError(f"hub data set {name!r} has no train split", f"Its splits: {', '.join(splits)}")
    tables = {split: splits[split].data.table for split in SPLITS if split in splits}
    found = {s: from_arrow(f"{name}/{s}", t.schema, t.to_batches(max_chunksize=1000)) for s, t in tables.items()}
    return found | {split: read_file(Path(path)) for split, path in sources.items() if split != "train"}
