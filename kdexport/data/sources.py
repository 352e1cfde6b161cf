"""Files, folders and Hub ids → validated rows with the task's columns; errors name the bad row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kdexport import spec
from kdexport.data import folders, hub
from kdexport.data.beir import is_beir, read_beir
from kdexport.data.candidates import read_candidates
from kdexport.data.passages import Cut
from kdexport.data.read import AT_ONCE, SUFFIXES, Raw, Source, from_arrow, read_file
from kdexport.errors import DataError, MissingPackage, counted, first_line
from kdexport.files import is_place
from kdexport.progress import say, warn
from kdexport.tasks import DEFAULT, kinds
from kdexport.tasks.base import Task

SPLITS = ("train", "validation", "test")

# Pairs of columns that are recognised by default, in order of preference; tasks have the single ones.
_OBVIOUS_PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("query", "passage"),
)  # fmt: skip

# Which rows must have labels: all; all if there is a label column; some; labels are not read.
Labels = Literal["all", "if any", "some", "none"]
# The rows that are looked at for signs of a task.
_SHOWING = 100
# Our column → the file's.
Columns = dict[str, str]
Row = dict[str, Any]
# Where valid rows are put, in memory or on disk.
Keep = Callable[[Iterable[Row]], Sequence[Row]]


class Checked(NamedTuple):
    """Valid rows with a stable id `<file>:<row>`, counted from 1; the number of bad rows; the source's columns."""

    rows: Sequence[Row]
    bad: int
    columns: Columns


def find_splits(data: spec.Data) -> dict[str, str]:
    """Return split → file or Hub id; a folder or a Hub data set has splits of its own."""
    given = {split: path for split in SPLITS if (path := getattr(data, split))}
    folder = Path(data.train)
    if not folder.is_dir():
        return given
    if is_beir(folder):
        judged = read_beir(folder).judged
        return (dict.fromkeys(judged, data.train) if "train" in judged else {"train": data.train}) | given
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    found = {split: str(path) for split in SPLITS for path in files if path.stem in folders.NAMES[split]}
    found = found if "train" in found else folders.splits_in(folder)
    if "train" not in found:
        known = "train.csv, .tsv, .jsonl, .parquet or .txt, nor images or WAV files"
        raise DataError(f"{folder} holds no {known}", "Name the file with --data")
    return found | {split: path for split, path in given.items() if split != "train"}


def local_files(data: spec.Data) -> list[Path]:
    """Return the files that determine the rows; a missing or empty one is an error."""
    paths = [Path(source) for source in find_splits(data).values() if _is_local(source)]
    listed = None if data.words in ("open", "closed") else data.words
    paths += [Path(file) for file in (data.unlabelled, data.sentences, listed) if file]
    for path in paths:
        if not path.exists():
            fix = "Take open, closed, or a file of words" if str(path) == listed else "Check the path"
            raise DataError(f"{path} does not exist", fix)
        if not path.is_file() and not folders.splits_in(path) and not is_beir(path):
            raise DataError(f"{path} holds no images and no recordings", "Check the path")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
    return paths


def read_splits(data: spec.Data, *, whole: bool = False, ranked: bool = False) -> dict[str, Source]:
    """Open every split of the spec; text files are read as `whole` texts, or a text per line.

    Of a folder in BEIR's layout rows are queries and documents, or each query's documents to be `ranked`.
    """
    sources = find_splits(data)
    if not _is_local(sources["train"]):
        return _read_hub(sources)
    most = data.candidates if ranked else 0
    return {split: _read_local(Path(source), whole, split, most) for split, source in sources.items()}


def recognised(data: spec.Data, task: str | None = None) -> tuple[str, str]:
    """Return the task and the problem of which the first rows show signs; test must have labels, train need not.

    The problem is one of `task`, where that is given. Rows of texts whose labels the spec names need none.
    """
    every = [kind for kind in kinds() if "endpoint" in kind.menu.teachers] if data.labels else kinds()
    try:
        sources = read_splits(data, ranked=task is None or any(kind.together for kind in kinds() if kind.name == task))
        source = sources.get("test", sources["train"])
        raws = [raw for raw in islice(source.rows, _SHOWING) if isinstance(raw, dict)]
    except DataError:
        raws = []  # the data stage names what is wrong
    asked = [kind for kind in every if (kind.name == task if task else not kind.labels_judge)]
    for kind in asked if raws else []:
        try:
            alone = kind.transcribes and len(source.columns) == 1  # which the teacher is to transcribe
            columns = choose_columns(source, data, kind, "if any" if alone else "all")
        except DataError:
            continue
        if source.lines and kind.has_labels and not alone:
            continue
        if data.labels:  # those rows show signs that have a label
            raws = [raw for raw in raws if raw.get(columns.get("label", "")) not in (None, "")]
        if raws and (kind.has_labels or kind.labels_judge or len(source.columns) == 1):
            rows = [{ours: raw.get(theirs) for ours, theirs in columns.items()} for raw in raws]
            placed = [row | {kind.modality: _placed(row[kind.modality], kind, source)} for row in rows]
            if signs := kind.signs(placed):
                several = len(kind.kinds()) > 1 and kind.modality == "text"
                problem = f" with data.problem {kind.problem}" if several else ""
                if task is None:
                    say(f"task: {kind.name}{problem}, as {signs} in {source.name}; --task names another")
                return kind.name, kind.problem
    return task or DEFAULT, "single-label"


def read_test(data: spec.Data, *, ranked: bool = False) -> Source:
    """Open `data.train`: a file, or the test split of a folder or a Hub data set, if there is one."""
    splits = read_splits(data, ranked=ranked)
    split = "test" if "test" in splits else "train"
    if len(splits) > 1:
        say(f"data: of {data.train} the {split} split is taken")
    return splits[split]


def rows_of_sources(data: spec.Data) -> dict[str, int]:
    """Count all rows, valid or not, of each split's file and of the unlabelled texts."""
    sources = read_splits(data) | ({"unlabelled": read_file(Path(data.unlabelled))} if data.unlabelled else {})
    return {split: sum(1 for _ in source.rows) for split, source in sources.items()}


def to_rows(source: Source, data: spec.Data, task: type[Task], labels: Labels = "all", cut: Cut | None = None,
            known: Mapping[str, str] | None = None, keep: Keep = list) -> Checked:  # fmt: skip
    """Select the columns and validate every row.

    Rows without a label, where `labels` allows it, have the label None. `cut` splits a text into passages, each a row
    with the id `<file>:<row>.<passage>`; `known` are the columns of the model's training data.
    """
    columns = choose_columns(source, data, task, labels, known)
    needed = "label" in columns and labels != "some"

    def ready(name: str, raw: Raw) -> list[Row]:
        row = {ours: raw.get(theirs) for ours, theirs in columns.items()}
        row[task.modality] = _placed(row[task.modality], task, source)
        label = row.pop("label", None)
        found = task.canonical(row | {"label": label if needed or label != "" else None})
        if problem := found if isinstance(found, str) else task.check(found, data.max_chars, needed):
            raise DataError(problem)
        assert not isinstance(found, str)
        return task.parts(found, name)

    def take(name: str, raw: Raw) -> Iterator[Row]:
        if source.lines and not raw["text"].strip():
            return
        text, i = raw.get(columns.get("text", "")), 0
        for i, part in enumerate(cut(text), 1) if cut and isinstance(text, str) else ():
            yield from ready(f"{name}.{i}", raw | {columns["text"]: part})
        if not i:
            yield from ready(name, raw)

    bad = 0

    def good() -> Iterator[Row]:
        nonlocal bad
        for row in _taken(source, data, take):
            if row is None:
                bad += 1
            else:
                yield row

    rows = keep(good())
    if not rows:
        raise DataError(f"{source.name}: none of its {bad} rows can be used" if bad else f"{source.name} holds no rows")
    return Checked(rows, bad, columns)


def unify(
    read: dict[str, Checked], data: spec.Data, task: type[Task], keep: Callable[[str], Keep] = lambda split: list
) -> dict[str, Checked]:
    """Convert labels that only all rows explain; name or leave out rows that don't fit."""
    every: Sequence[Row] = reduce(add, (one.rows for one in read.values()))
    rows, remark = task.unified(every)
    if remark:
        say(f"data: {remark}")
    if rows is every:
        return read
    left = iter(rows)

    def good(rows: Sequence[Row]) -> Iterator[Row]:
        for before, after in zip(rows, left, strict=False):
            if not isinstance(after, str):
                yield dict(after)
            elif not data.skip_bad_rows:
                raise _bad(before["id"].replace(":", ", row "), after)

    found = {}
    for split, one in read.items():
        kept = keep(split)(good(one.rows))
        found[split] = one._replace(rows=kept, bad=one.bad + len(one.rows) - len(kept))
    return found


def read_given(
    data: spec.Data, task: type[Task], labels: Labels, known: Mapping[str, str] | None = None
) -> tuple[list[Row], Columns]:
    """Read the rows and columns of the data that a command is given beside a model."""
    found = unify({"": to_rows(read_test(data, ranked=task.together), data, task, labels, known=known)}, data, task)[""]
    if found.bad:
        warn(f"data: {counted(found.bad, 'bad row')} left out")
    return list(found.rows), found.columns


def to_answer(source: Source, data: spec.Data, task: Task, known: Mapping[str, str]) -> Iterator[Row | None]:
    """Yield each row's `id`, the input as `asked`, and the task's `row`; None for a bad row.

    An empty text is valid.
    """
    columns = choose_columns(source, data, type(task), "none", known)

    def take(name: str, raw: Raw) -> Iterator[Row]:
        given, second = raw.get(columns[task.modality]), raw.get(columns.get("text_pair", ""))
        for name_of, text in (("text", given), ("text_pair", second)):
            if task.modality == "text" and isinstance(text, str) and len(text) > data.max_chars:
                raise DataError(f"{name_of} has {len(text):,} characters (a quote left open?)")
        given = given if source.lines else _placed(given, task, source)
        asked = (given, second) if second else given
        yield {"id": name, "asked": asked, "row": task.row(asked)}

    return _taken(source, data, take)


def read_unlabelled(data: spec.Data, task: type[Task], cut: Cut | None = None, keep: Keep = list) -> Checked:
    """Read `data.unlabelled`, with the label None. See `to_rows`."""
    return to_rows(read_file(Path(data.unlabelled or ""), whole=cut is not None), data, task, "none", cut, keep=keep)


def choose_columns(
    source: Source, data: spec.Data, task: type[Task], labels: Labels = "all", known: Mapping[str, str] | None = None
) -> Columns:
    """Map our columns to the file's: as in the spec, else as `known`, else by common names."""
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
        elif task.pairs:
            pair = next((p for p in _OBVIOUS_PAIRS if set(p) <= set(there)), (None, None))
            named["text"], named["text_pair"] = pair
    for wanted, names in task.columns.items():
        if wanted == "label" and labels == "none":
            continue
        candidates = (named[wanted], (known or {}).get(wanted), *names)
        guessed = (column for name in names for column in there if column.lower() == name)  # Text, as text
        named[wanted] = next((name for name in candidates if name in there), None) or next(guessed, None)
        if named[wanted] is None and (wanted != "label" or labels == "all"):
            flag = "text" if wanted == reads else wanted.replace("_", "-")
            fix = f"Name it with --{flag}. Its columns: {', '.join(there)}"
            raise DataError(f"{source.name}: which column is the {wanted}?", fix)
    return {ours: theirs for ours, theirs in named.items() if theirs}


def _taken(source: Source, data: spec.Data, take: Callable[[str, Raw], Iterator[Row]]) -> Iterator[Row | None]:
    """Yield what `take` makes of each row; a bad row is an error, or None with `skip_bad_rows`."""
    for number, raw in enumerate(source.rows, 1):
        try:
            if isinstance(raw, str):
                raise DataError(raw)
            yield from take(f"{source.name}:{number}", raw)
        except DataError as error:
            if not data.skip_bad_rows:
                raise _bad(f"{source.name}, row {number}", error.what) from None
            yield None


def _bad(row: str, what: str) -> DataError:
    return DataError(f"{row}: {what}", "Mend the row, or leave such rows out: --skip-bad-rows")


def _placed(value: Any, task: Task | type[Task], source: Source) -> Any:
    """Return the absolute path, or the bytes, in a column of images or recordings; texts are unchanged."""
    if task.modality == "text":
        return value
    if isinstance(value, dict):  # as in Hugging Face's data sets
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return str(source.folder.absolute() / value) if isinstance(value, str) and value else value


def _is_local(source: str) -> bool:
    return Path(source).suffix.lower() in SUFFIXES or is_place(source)


def _read_local(path: Path, whole: bool, split: str = "train", candidates: int = 0) -> Source:
    """Read a file, or a folder of images or recordings with a table, or with labels as subfolders, or BEIR's."""
    if not path.is_dir():
        return read_file(path, whole=whole)
    if is_beir(path) and candidates:
        return read_candidates(path, split, candidates)
    if is_beir(path):
        return Source(path.name, ["text", "label"], _searched(path, split), path)
    if table := folders.metadata_of(path):
        return replace(read_file(table), name=f"{path.name}/{table.name}")
    return Source(path.name, ["file_name", "label"], folders.labelled_files(path), path)


def _searched(folder: Path, split: str) -> Iterator[Raw | str]:
    """Yield the documents of a folder in BEIR's layout, and the queries of a split, or all where it names no splits."""
    found = read_beir(folder)
    every = {query: gains for one in found.judged.values() for query, gains in one.items()}
    for name, text in found.documents():
        yield {"text": text, "label": {"document": name}}
    for name, gains in found.judged.get(split, every).items():
        yield {"text": found.queries[name], "label": {"gains": gains}}


def _read_hub(sources: dict[str, str]) -> dict[str, Source]:
    """Read a Hub data set `name` or `name:config`; splits named in the spec override its own."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingPackage("datasets", "distill") from None
    hub.in_reach()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    name, _, config = sources["train"].partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # connection, missing id, missing config: many classes
        reason = first_line(error)
        raise DataError(f"no file and no data set on the hub: {sources['train']!r} ({reason})") from None
    if "train" not in splits:
        raise DataError(f"hub data set {name!r} has no train split", f"Its splits: {', '.join(splits)}")
    tables = {split: splits[split].data.table for split in SPLITS if split in splits}
    found = {split: from_arrow(f"{name}/{split}", t.schema, t.to_batches(AT_ONCE)) for split, t in tables.items()}
    return found | {split: read_file(Path(path)) for split, path in sources.items() if split != "train"}
