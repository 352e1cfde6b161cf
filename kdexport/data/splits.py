"""Split rows: stratified, seeded, and never the same text on both sides."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from kdexport.analysis.duplicates import first_of_each, keys_of
from kdexport.data.rows import Rows
from kdexport.errors import DataError
from kdexport.tasks.base import Task
from kdexport.tasks.config import Row

# Fewer labelled rows than these say too little of a model: a share of 90 % is known to 8 points.
_TO_JUDGE = 50


def split_off(rows: Rows, fraction: float, seed: int, task: type[Task]) -> tuple[Rows, Rows]:
    """Split into (rest, part), stratified by the task; rows of one unit stay together, in the rows' order.

    Each class contributes its rounded fraction of distinct units, at least one, and keeps at least one; a class
    with one unit stays in the rest, for training.
    """
    keys = keys_of(rows, task.unit)
    shared = np.array([task.shared(row) for row in rows], dtype=bool)
    by_label: dict[str, list[int]] = defaultdict(list)
    own = np.flatnonzero(~shared)
    for i in own[first_of_each(keys[own])].tolist():
        by_label[task.stratum(rows[i])].append(i)
    chosen: list[int] = []
    for label, places in sorted(by_label.items()):
        n = min(max(1, round(fraction * len(places))), len(places) - 1)
        chosen += random.Random(f"{seed}:{label}").sample(places, n)
    part = np.isin(keys, keys[chosen])
    return rows.take(np.flatnonzero(~part | shared)), rows.take(np.flatnonzero(part | shared))


def split_labelled(rows: Rows, fraction: float, seed: int, task: type[Task]) -> tuple[Rows, Rows]:
    """Split into (rest, part) where few rows have labels: the part has labels throughout, or where too few do, none."""
    labelled = np.array([row["label"] is not None for row in rows], dtype=bool)
    wanted, there = round(fraction * len(rows)), int(labelled.sum())
    if _TO_JUDGE <= there <= wanted:
        return rows.take(np.flatnonzero(~labelled)), rows.take(np.flatnonzero(labelled))
    source = labelled if there > wanted else ~labelled
    rest, part = split_off(rows.take(np.flatnonzero(source)), wanted / source.sum(), seed, task)
    return rows.take(np.flatnonzero(~source)) + rest, part


def check_classes(rows: Sequence[Row], name: str) -> None:
    """Refuse labels that can't be learned: a single class, or a class with a single row."""
    counts = Counter(row["label"] for row in rows)
    if len(counts) < 2:
        fix = "A classifier needs two classes or more: is --label the right column?"
        raise DataError(f"{name}: all {len(rows)} rows have the label {next(iter(counts))!r}", fix)
    lone = [label for label, count in counts.items() if count == 1]
    if lone:
        row = next(row for row in rows if row["label"] == lone[0])
        more = f" (and {len(lone) - 1} more such classes)" if len(lone) > 1 else ""
        what = f"class {lone[0]!r} has this row alone{more}, so it can't be both learned and tested"
        fix = "Add rows, or leave it out: --skip-bad-rows"
        raise DataError(f"{row['id'].replace(':', ', row ')}: {what}", fix)


def new_rows(rows: Rows, splits: Iterable[Rows], task: type[Task]) -> Rows:
    """Return distinct rows whose content is in no split: training must not see a text of test, labelled or not."""
    keys = keys_of(rows, task.likeness)
    places = first_of_each(keys)
    for split in splits:
        places = places[~np.isin(keys[places], keys_of((row for row in split if not task.shared(row)), task.likeness))]
    if len(rows) and not len(places):
        raise DataError("all unlabelled texts occur in train, validation or test as well", "Leave data.unlabelled out")
    return rows.take(places)
