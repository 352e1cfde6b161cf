"""Splitting rows: stratified, seeded, and never the same text on both sides."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

from kdexport.errors import DataError
from kdexport.tasks.base import Task

Rows = list[dict[str, Any]]


def split_off(rows: Rows, share: float, seed: int, task: type[Task]) -> tuple[Rows, Rows]:
    """Split into (rest, part), stratified by label (as the task has it); rows with equal content stay together.

    Each class gives the part its rounded share of distinct contents, at least one, and keeps at least one.
    A class with one distinct text stays where it can be learned from. The order of rows is kept.
    """
    content = task.content
    groups: dict[str, str] = {}  # content → stratum of its first row
    for row in rows:
        groups.setdefault(content(row), task.stratum(row))
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, label in groups.items():
        by_label[label].append(text)
    chosen: set[str] = set()
    for label in sorted(by_label):
        texts = by_label[label]
        if len(texts) < 2:
            continue
        n = min(max(1, round(share * len(texts))), len(texts) - 1)
        chosen.update(random.Random(f"{seed}:{label}").sample(texts, n))
    return [r for r in rows if content(r) not in chosen], [r for r in rows if content(r) in chosen]


def check_classes(rows: Rows, name: str) -> None:
    """Refuse labels that nothing can be learned from: one class only, or a class with a single row."""
    counts = Counter(row["label"] for row in rows)
    if len(counts) < 2:
        raise DataError(
            f"{name}: all {len(rows)} rows have the label {next(iter(counts))!r}",
            "A classifier needs two classes or more: is --label the right column?",
        )
    lone = [label for label, count in counts.items() if count == 1]
    if lone:
        row = next(row for row in rows if row["label"] == lone[0])
        more = f" (and {len(lone) - 1} more such classes)" if len(lone) > 1 else ""
        raise DataError(
            f"{row['id'].replace(':', ', row ')}: class {lone[0]!r} has this row alone{more}, so it can't be both "
            "learned and tested",
            "Add rows, or leave it out: --skip-bad-rows",
        )
