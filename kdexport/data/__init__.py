"""The data stage: any source → rows with stable ids, three splits, label names, and an audit of duplicates.

It writes `train.jsonl`, `validation.jsonl`, `test.jsonl`, `data.json`, and `unlabelled.jsonl` for unlabelled texts,
if any; later stages read rows from these files only. `near_duplicates.jsonl` is for inspection. Rows of train and
validation may have the label None: the teacher labels them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

from kdexport import spec
from kdexport.analysis.duplicates import Audit, audit, near_duplicates
from kdexport.data.passages import Cut
from kdexport.data.read import read_lines
from kdexport.data.rows import Row, Rows, copy_rows, write_rows
from kdexport.data.sources import SPLITS, Columns, Labels, read_splits, read_unlabelled, to_rows, unify
from kdexport.data.splits import check_classes, new_rows, split_labelled, split_off
from kdexport.errors import DataError, counted
from kdexport.files import write_bytes, write_json
from kdexport.progress import say, warn
from kdexport.tasks import DEFAULT, task_class
from kdexport.tasks.base import Task
from kdexport.tasks.config import MOST_LETTERS, MOST_WORDS

# Rows by split → rows with a label each, how many are left out by cause, and the language's code.
Transcribe = Callable[[Mapping[str, Rows]], tuple[Mapping[str, Iterable[Row]], dict[str, dict[str, int]], str]]

_TEST_FRACTION, _VALIDATION_FRACTION = 0.2, 0.1


class Summary(msgspec.Struct, frozen=True):
    """`data.json`: sizes, labels and the audit.

    `unlabelled` counts the texts beyond the splits, `columns` are the names of train's columns, `doubted` by split how
    many of the teacher's transcripts each filter left out, `heard` how many it gave to test rows, `words` the closed
    vocabulary, if it is one, `language` the code of the spoken language, where it is known.
    """

    rows: dict[str, int]
    labels: list[str]
    bad_rows: int
    split_by_us: list[str]
    duplicates: Audit
    unlabelled: int = 0
    task: str = DEFAULT
    problem: str = "single-label"
    columns: Columns = {}
    doubted: dict[str, dict[str, int]] = {}
    heard: int = 0
    words: list[str] = []
    language: str = ""


def prepare(
    settings: spec.Data,
    task: str,
    seed: int,
    out: Path,
    cut: Cut | None = None,
    transcribe: Transcribe | None = None,
    *,
    few_labels: bool = False,
) -> None:
    """Read the sources, check every row, split, audit, and write the rows.

    `cut` splits long texts into passages; `transcribe` labels rows without a label, and leaves out some of them.
    With `few_labels` no row needs a label, and labelled ones are for the test split first.
    """
    of_task = task_class(task, settings.problem)
    content = of_task.likeness
    lines = [] if settings.words in ("open", "closed") else read_lines(Path(settings.words))
    listed = {word for line in lines for word in line.split()}

    def spool(step: str, split: str) -> Callable[[Iterable[Row]], Rows]:
        """Return what writes rows on their way through a step, so that memory holds few of them."""
        return partial(write_rows, out, f"{step}-{split}", blob=split)

    out.mkdir(exist_ok=True)
    for left in (*out.glob("*.blob"), *out.glob("*-*.jsonl")):  # of a call that was killed
        left.unlink()
    read = {}
    sources = read_splits(settings, whole=cut is not None, ranked=of_task.together)
    for split, source in sources.items():
        # Test rows need labels; without a test split they are taken from train.
        labels: Labels = "all" if split == "test" or "test" not in sources else "if any"
        labels = "some" if of_task.labels_judge or few_labels else "if any" if transcribe else labels
        read[split] = to_rows(source, settings, of_task, labels, cut, keep=spool("read", split))
    read = unify(read, settings, of_task, partial(spool, "unified"))
    beyond = []
    if settings.unlabelled:
        beyond = [read_unlabelled(settings, of_task, cut, keep=spool("read", "unlabelled"))]
    splits, columns = {split: cast(Rows, one.rows) for split, one in read.items()}, read["train"].columns
    doubted, language = dict[str, dict[str, int]](), ""
    if transcribe:
        heard_in, doubted, language = transcribe(splits)
        splits = {split: spool("heard", split)(rows) for split, rows in heard_in.items()}
    if bad_rows := sum(one.bad for one in (*read.values(), *beyond)):
        warn(f"data: {counted(bad_rows, 'bad row')} left out")
    if settings.skip_bad_rows and of_task.one_label and not few_labels:
        splits["train"], lone = _without_lone_classes(splits["train"])
        bad_rows += lone
    if _has_labels(splits["train"]) and of_task.one_label and not few_labels:
        check_classes(splits["train"], "train")
    missing = [split for split in SPLITS if split not in splits]
    for split, fraction in (("test", _TEST_FRACTION), ("validation", _VALIDATION_FRACTION)):
        if split in missing:
            off = split_labelled if few_labels and split == "test" else split_off
            splits["train"], splits[split] = off(splits["train"], fraction, seed, of_task)
    ours = {split: splits[split] for split in SPLITS}
    kept, found = audit(ours, content, settings.drop_duplicates, shared=of_task.shared)
    splits = {split: splits[split].take(kept[split]) for split in SPLITS}
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{split} holds no rows once duplicates are dropped", "Name another file for it")
    if why := of_task.misfit(splits["test"]):
        raise DataError(f"test can't judge by {of_task.metric.name}: {why}", "Name another file with --test")
    if heard := sum(bool(row.get("heard")) for row in splits["test"]):
        warn(f"data: errors are against the teacher's words in {counted(heard, 'test row')}, which had no transcript")
    unlabelled = [new_rows(cast(Rows, one.rows), splits.values(), of_task) for one in beyond]
    names = _label_names(splits, of_task, settings.labels, few_labels)
    words = [] if settings.words == "open" else _closed(splits, listed)
    if of_task.modality == "text":
        own = {split: np.flatnonzero([not of_task.shared(row) for row in rows]) for split, rows in splits.items()}
        compared = {split: splits[split].take(places) for split, places in own.items()}
        near, pairs = near_duplicates(compared, of_task.unit if of_task.together else content)
        if of_task.labels_judge:  # such labels are no classes
            near = msgspec.structs.replace(near, conflicting_labels=0)
            found = msgspec.structs.replace(found, conflicting_labels=0)
        found = msgspec.structs.replace(found, near=near)
        write_bytes(out / "near_duplicates.jsonl", b"".join(msgspec.json.encode(pair) + b"\n" for pair in pairs))
    for name, rows in (*splits.items(), *(("unlabelled", rows) for rows in unlabelled)):
        copy_rows(out, name, rows)
    for path in out.glob("*-*.jsonl"):
        path.unlink()
    counts, beyond_splits = {split: len(rows) for split, rows in splits.items()}, sum(map(len, unlabelled))
    given = (task, settings.problem, columns)
    summary = Summary(counts, names, bad_rows, missing, found, beyond_splits, *given, doubted, heard, words, language)
    write_json(out / "data.json", summary)
    if guessed := _guessed(columns, settings):
        say(f"data: columns {guessed}")
    _tell(counts, names, of_task.label_word, missing, found)
    alone = [split for split, rows in splits.items() if not _has_labels(rows)]
    if alone or beyond_splits:
        more = [f"{counted(beyond_splits, 'text')} beyond the splits"] if beyond_splits else []
        say(f"data: without labels, so the teacher labels them: {', '.join([*alone, *more])}")


def read_rows(folder: Path, split: str) -> Rows:
    """Return the rows of one split of a finished data stage."""
    return Rows(folder / f"{split}.jsonl")


def read_summary(folder: Path) -> Summary:
    """Read `data.json` of a finished data stage."""
    return msgspec.json.decode((folder / "data.json").read_bytes(), type=Summary)


def _has_labels(rows: Iterable[Row]) -> bool:
    return any(row["label"] is not None for row in rows)


def _without_lone_classes(rows: Rows) -> tuple[Rows, int]:
    counts = Counter(row["label"] for row in rows)
    kept = rows.where(lambda row: row["label"] is None or counts[row["label"]] > 1)
    if len(kept) < len(rows):
        warn(f"data: {counted(len(rows) - len(kept), 'class', 'classes')} with a single row left out")
    return kept, len(rows) - len(kept)


def _label_names(
    splits: dict[str, Rows], task: type[Task], given: Iterable[str] | None = None, few: bool = False
) -> list[str]:
    """Return the labels in the order of logits: those that are given, or those of train.

    Other splits must not have more. An unlabelled train split has the labels of the other splits, and so has one of
    which few rows have one.
    """
    found = {split: {label for row in rows for label in task.labels_of(row)} for split, rows in splits.items()}
    if given:
        _check_given(splits, task, {*given})
        return task.ordered(given)
    others = found["validation"] | found["test"]
    labels = found["train"] | others if few else found["train"] or others
    for split in ("validation", "test"):
        for row in splits[split] if found[split] - labels else []:
            if strange := sorted(task.labels_of(row) - labels):
                where = row["id"].replace(":", ", row ")
                what, fix = (
                    ("character", "Spell numbers out, or add rows") if task.transcribes else ("label", "Add rows")
                )
                raise DataError(f"{where}: {what} {strange[0]!r} occurs in no row of train", f"{fix} to train")
    if len(labels) < 2 and task.has_names:
        found_few = f"one label only: {', '.join(labels)}" if labels else "no labels"
        fix = "Name them all: --labels refund,delay,praise" if few else "Is --label the right column?"
        raise DataError(f"the rows have {found_few}", fix)
    return task.ordered(labels)


def _check_given(splits: dict[str, Rows], task: type[Task], given: set[str]) -> None:
    for rows in splits.values():
        for row in rows:
            if strange := sorted(task.labels_of(row) - given):
                where = row["id"].replace(":", ", row ")
                raise DataError(f"{where}: label {strange[0]!r} is none of data.labels", "Add it, or mend the row")


def _closed(splits: dict[str, Rows], listed: set[str]) -> list[str]:
    """Return the words of a closed vocabulary, the listed ones or those of train, and warn of words beyond them."""
    said = {split: {word for row in rows for word in (row["label"] or "").split()} for split, rows in splits.items()}
    words = listed or said["train"]
    if not 0 < len(words) <= MOST_WORDS:
        raise DataError(f"data.words: there are {len(words):,} words, not 1 to {MOST_WORDS:,}", "Remove it")
    if longest := [word for word in words if len(word) > MOST_LETTERS]:
        raise DataError(f"data.words: {longest[0][:20]}… is longer than {MOST_LETTERS} characters", "Leave it out")
    heard = {character for word in said["train"] for character in word}
    if strange := sorted(word for word in words if {*word} - heard):
        character = min({*strange[0]} - heard)
        what = f"data.words: {strange[0]!r} has {character!r}, which no transcript of train has"
        raise DataError(what, "Leave the word out, or add rows to train")
    for split, own in said.items():
        if beyond := sorted(own - words):
            warn(f"data: words of {split} beyond data.words can't be recognised: {', '.join(beyond[:8])}")
    return sorted(words)


def _guessed(columns: Columns, settings: spec.Data) -> str:
    """Describe which columns are read as what; empty where all were named, or have our names."""
    named = (settings.text, settings.text_pair, settings.label)
    guessed = {ours: theirs for ours, theirs in columns.items() if theirs not in named}
    if all(theirs in (ours, "file_name") for ours, theirs in guessed.items()):
        return ""
    return ", ".join(f"{theirs} as {ours.replace('_', ' ')}" for ours, theirs in guessed.items())


def _tell(counts: dict[str, int], labels: list[str], word: str, missing: list[str], found: Audit) -> None:
    sizes = ", ".join(f"{n:,} {split}{' (split off)' if split in missing else ''}" for split, n in counts.items())
    say(f"data: {sizes}{f'; {len(labels)} {word}' if len(labels) > 1 else ''}")
    if found.duplicates:
        across, dropped = (f"{sum(one.values()):,}" for one in (found.across, found.dropped))
        exact = f"exact duplicates: {found.duplicates:,} of {counted(found.rows, 'row')}"
        say(f"data: {exact}; {across} in two splits, {dropped} dropped")
    if found.near:
        near = [(key.split("–"), n) for key, n in found.near.across.items() if n]
        if pairs := ", ".join(f"{counted(n, 'text')} of {late} in {early}" for (early, late), n in near):
            say(f"data: near duplicates: {pairs}; they are kept, and listed in near_duplicates.jsonl")
        for split, n in found.near.texts.items():
            if (some := found.near.compared.get(split, 0)) < n:
                sample = f"a random sample of {split}: {some:,} of {n:,} texts"
                warn(f"data: the search for near duplicates covered {sample}")
    if found.conflicting_labels:
        warn(f"data: {counted(found.conflicting_labels, 'text')} with more than one label")
