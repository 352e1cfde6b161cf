"""Exact duplicates within and across splits: found, counted, and kept out of training.

A text that stands in train and in test makes the test's figure a figure of memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import msgspec

Rows = list[dict[str, Any]]


class Audit(msgspec.Struct, frozen=True):
    """What the audit found.

    `duplicates` and `within` count rows that repeat an earlier one; `across` counts distinct contents that
    stand in both splits; `conflicting_labels` counts contents that occur with several labels.
    """

    rows: int
    duplicates: int
    conflicting_labels: int
    within: dict[str, int]
    across: dict[str, int]
    dropped: dict[str, int]


def audit(
    splits: dict[str, Rows], content: Callable[[dict[str, Any]], str], drop: bool
) -> tuple[dict[str, Rows], Audit]:
    """Count duplicates, and drop from train what stands in validation or test, from validation what is in test.

    Args:
        splits: split → rows, in this order: train, validation, test.
        content: what a model sees of a row.
        drop: whether to drop; they are counted either way.
    """
    seen = {split: Counter(content(row) for row in rows) for split, rows in splits.items()}
    labels: dict[str, set[str]] = defaultdict(set)
    for rows in splits.values():
        for row in rows:
            labels[content(row)].add(row["label"])
    names, kept = list(splits), dict(splits)
    across: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for i, early in enumerate(names[:-1]):
        later = set().union(*(seen[late] for late in names[i + 1 :]))
        across |= {f"{early}–{late}": len(seen[early].keys() & seen[late].keys()) for late in names[i + 1 :]}
        if drop:
            kept[early] = [row for row in splits[early] if content(row) not in later]
            dropped[early] = len(splits[early]) - len(kept[early])
    n = sum(len(rows) for rows in splits.values())
    return kept, Audit(
        rows=n,
        duplicates=n - len(labels),
        conflicting_labels=sum(len(found) > 1 for found in labels.values()),
        within={split: counts.total() - len(counts) for split, counts in seen.items()},
        across=across,
        dropped=dropped,
    )
