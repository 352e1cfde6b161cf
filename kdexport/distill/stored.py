"""A teacher that is a file of logits: find and check those of every row of the data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdexport.data import read_rows, read_summary
from kdexport.data.sources import SPLITS
from kdexport.distill.store import Store, content_keys
from kdexport.distill.teacher import match_labels
from kdexport.errors import ModelError, first_line
from kdexport.progress import say
from kdexport.tasks import task_class
from kdexport.tasks.metrics import Array

Rows = Sequence[dict[str, Any]]
Content = Callable[[dict[str, Any]], str]

_PARTS = (*SPLITS, "unlabelled")


class Part(NamedTuple):
    """The logits [N, C] of one file's rows, in its order, or with the id or content of each row in `names`."""

    logits: Array
    names: list[str] | None = None
    by: str = "row"


class Stored(NamedTuple):
    """A file of logits; `labels` name the columns, if it has them."""

    labels: list[str] | None
    parts: dict[str, Part]


def take_stored(path: Path, data: Path, source_rows: Mapping[str, int], task: str, out: Path) -> list[str]:
    """Write the logits of every row of the data stage by content as `out/logits/`; return the labels in their order.

    Args:
        path: `.npz` with arrays `train`, `validation`, `test`, `unlabelled` (float [N, C], in the order of the data
            file's rows; rows that kdexport splits off are rows of train), optional `labels` (names of the columns) and
            `ids_train`, … (our row ids, `<file>:<row>`, in any order). Or `.parquet`: a column a label, or one column
            `logits` or `embedding` of lists; with a column `id`, or `text` (and `text_pair`), or in the order of one
            file.
        source_rows: the number of rows in each split's file.

    Raises:
        ModelError: the file can't be read, or its rows, classes or names don't match the data.
    """
    kind = task_class(task)
    content = kind.content
    stored = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path, content)
    labels = _labels(path, stored, read_summary(data).labels, named=kind.has_labels)
    found: dict[str, Array] = {}
    for split in _PARTS:
        if split in SPLITS or (data / f"{split}.jsonl").is_file():
            rows = read_rows(data, split)
            source = "train" if split in read_summary(data).split_by_us else split
            logits = _find(path, stored, source, rows, source_rows.get(source, 0), content)
            for row, answer in zip(rows, logits, strict=True):
                found.setdefault(content(row), answer)  # a text that occurs twice has one answer, the first
    answers = np.stack(list(found.values()))
    if kind.embeds:  # as the task packs them
        answers = answers.astype(np.float16)
    Store(out / "logits").add(content_keys(found), answers)
    return labels


def width_of(stage: Path) -> int:
    """Return the number of columns in a finished `logits/`."""
    (shard,) = (stage / "logits").glob("*.npy")
    return int(np.load(shard, mmap_mode="r")["logits"].shape[1])


def _find(path: Path, stored: Stored, source: str, rows: Rows, source_rows: int, content: Content) -> Array:
    """Return the logits float32 [N, C] of rows from the file of the split `source`."""
    part = stored.parts.get(source)
    if part is None:
        raise ModelError(f"{path} has no logits for {source}", f"It has: {', '.join(stored.parts)}")
    if part.by == "row":
        if len(part.logits) != source_rows:
            raise ModelError(
                f"{path} has {len(part.logits):,} rows of logits for {source}, whose file has {source_rows:,}",
                "Give one for each row of the file, in its order; or name the rows by their ids",
            )
        if twins := [row["id"] for row in rows if "." in row["id"].rpartition(":")[2]]:
            what = f"{path} has a row of logits for each row of {source}, of which some are two texts, like {twins[0]}"
            raise ModelError(what, "Name the rows by such ids, or store vectors by text")
        places = [int(row["id"].rpartition(":")[2]) - 1 for row in rows]
    else:
        assert part.names is not None
        place = {name: i for i, name in enumerate(part.names)}
        wanted = [row["id"] if part.by == "id" else content(row) for row in rows]
        if missing := [i for i, name in enumerate(wanted) if name not in place]:
            more = f" (nor {len(missing) - 1:,} others)" if len(missing) > 1 else ""
            ours, theirs = wanted[missing[0]][:40], part.names[0][:40]
            raise ModelError(
                f"{path} has no logits for {place_of(rows[missing[0]])}{more}: its {part.by}s are like {theirs!r}, "
                f"this one is {ours!r}",
                "Store logits for every row of the data",
            )
        places = [place[name] for name in wanted]
    logits = part.logits[places].astype(np.float32)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise ModelError(f"{path}: the logits for {place_of(rows[int(np.argmin(finite))])} are not finite")
    return logits


def _labels(path: Path, stored: Stored, known: list[str], *, named: bool) -> list[str]:
    classes = {part.logits.shape[1] for part in stored.parts.values()}
    if len(classes) > 1:
        raise ModelError(f"{path} has arrays of different numbers of columns: {', '.join(map(str, sorted(classes)))}")
    columns = classes.pop()
    if not named:
        if stored.labels is not None:
            raise ModelError(f"{path} names labels, and vectors have none", "Leave them out: a column of lists")
        return []
    if stored.labels is None:
        if columns != len(known):
            raise ModelError(
                f"{path} has logits of {columns} classes, the data have {len(known)} labels", "Name them: labels"
            )
        say(f"teacher {path} does not name its classes; taken in the data's order: {', '.join(known[:8])}")
        return list(known)
    if len(stored.labels) != columns or len(set(stored.labels)) != columns:
        raise ModelError(f"{path} names {len(set(stored.labels))} labels for logits of {columns} classes")
    return match_labels(stored.labels, known, str(path), can_learn=False)


def _read_npz(path: Path) -> Stored:
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises a handful of classes, and ValueError for objects, which it won't run
        raise ModelError(
            f"{path} can't be read: {first_line(error)}", "Write it with numpy.savez, no objects"
        ) from None
    strange = sorted(set(arrays) - {"labels", *_PARTS, *(f"ids_{split}" for split in _PARTS)})
    if strange or not set(arrays) & set(_PARTS):
        raise ModelError(f"{path} holds {', '.join(arrays) or 'nothing'}", f"Name its arrays {', '.join(_PARTS)}")
    parts = {}
    for split in _PARTS:
        if split in arrays:
            ids = [str(i) for i in arrays[f"ids_{split}"]] if f"ids_{split}" in arrays else None
            parts[split] = _part(path, split, arrays[split], ids, "id" if ids is not None else "row")
    labels = [str(label) for label in arrays["labels"]] if "labels" in arrays else None
    # Rows of one file may be asked for as another split's: an id says which row it is wherever it stands.
    named = {split: part for split, part in parts.items() if part.by == "id"}
    if named:
        ids = [name for part in named.values() for name in part.names or ()]
        whole = _part(path, "all", np.concatenate([part.logits for part in named.values()]), ids, "id")
        parts |= {split: whole for split in _PARTS if split in named or split not in parts}
    return Stored(labels, parts)


def _read_parquet(path: Path, content: Content) -> Stored:
    import pyarrow.compute
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # pyarrow's own classes, and OSError
        raise ModelError(f"{path} can't be read: {first_line(error)}") from None
    classes = [name for name in table.column_names if name not in ("id", "text", "text_pair") and name[:2] != "__"]
    if classes in (["logits"], ["embedding"]):
        (column,) = classes
        labels, lengths = None, pyarrow.compute.list_value_length(table[column]).to_pylist()
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ModelError(f"{path}: its column {column!r} must hold lists of one length")
        logits = pyarrow.compute.list_flatten(table[column]).to_numpy().reshape(len(table), -1)
    else:
        labels = classes
        logits = np.stack([table[name].to_numpy() for name in classes], axis=1) if classes else np.empty((0, 0))
    if "id" in table.column_names:
        part = _part(path, "it", logits, [str(name) for name in table["id"].to_pylist()], "id")
    elif "text" in table.column_names:
        texts = table.select([name for name in ("text", "text_pair") if name in table.column_names]).to_pylist()
        part = _part(path, "it", logits, [content(row) for row in texts], "text")
    else:
        return Stored(labels, {"train": _part(path, "it", logits, None, "row")})
    return Stored(labels, dict.fromkeys(_PARTS, part))


def _part(path: Path, name: str, logits: Array, names: list[str] | None, by: str) -> Part:
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.number) or not len(logits):
        raise ModelError(f"{path}: {name} is {logits.dtype} {list(logits.shape)}, not numbers [rows, classes]")
    if names is not None and len(names) != len(logits):
        raise ModelError(f"{path} has {len(names):,} ids for {len(logits):,} rows of logits ({name})")
    if by == "id" and names is not None and len(set(names)) < len(names):
        twice = next(one for i, one in enumerate(names) if one in names[:i])
        raise ModelError(f"{path} has logits for {twice!r} twice")
    return Part(logits, names, by)


def place_of(row: dict[str, Any]) -> str:
    """Return a row's file and number for a message."""
    return str(row["id"]).replace(":", ", row ")
