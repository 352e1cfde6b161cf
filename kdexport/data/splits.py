"""Split rows: stratified, seeded, and never the same text on both sides."""

import random
from collections import Counter, defaultdict

from kdexport.data.sources import Rows
from kdexport.errors import DataError
from kdexport.tasks.base import Task


def split_off(rows: Rows, fraction: float, seed: int, task: type[Task]) -> tuple[Rows, Rows]:
    """Split into (rest, part), stratified by the task; rows with equal content stay together, in the rows' order.

    Each class contributes its rounded fraction of distinct contents, at least one, and keeps at least one; a class
    with one distinct text stays in the rest, for training.
    """
    content = task.content
    groups: dict[str, str] = {}  # content → stratum of its first row
    for row in rows:
        groups.setdefault(content(row), task.stratum(row))
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, label in groups.items():
        by_label[label].append(text)
    chosen: set[str] = set()
    for label, texts in sorted(by_label.items()):
        n = min(max(1, round(fraction * len(texts))), len(texts) - 1)
        chosen.update(random.Random(f"{seed}:{label}").sample(texts, n))
    return [r for r in rows if content(r) not in chosen], [r for r in rows if content(r) in chosen]


def check_classes(rows: Rows, name: str) -> None:
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
