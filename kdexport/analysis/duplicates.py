"""Exact and near duplicates, within and across splits: exact ones are kept out of training, near ones are reported.

A text that stands in train and in test makes the test's figure a figure of memory, and one that nearly does, almost.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdexport.analysis import sampled
from kdexport.errors import MissingPackage
from kdexport.tasks.metrics import Array

Rows = list[dict[str, Any]]

# Four characters: at 0.8 a sentence of eight words may differ in a letter, an ending or a short word, and a word more
# is already another sentence. (Of clinc150's test texts, runs of five found half as many; runs of three take the same
# words in another order for the same.)
_RUN, _SIMILAR = 4, 0.8
# 21 bands of 6: of two texts that are 0.8 alike 99.8 % are looked at, of two that are 0.4 alike 8 %; what is looked at
# is then compared exactly, so that nothing is reported that is not so.
_BANDS, _BAND = 21, 6
# Bounds on time and memory, for texts of one template and for data of millions: how many candidates are enough, how
# many of them, the likeliest, are compared exactly, and how many texts of a split are looked at (10 kB and, of 20
# words, 0.2 ms each).
_CROWD, _EXACT, _MOST = 100, 10, 50_000
_EXAMPLES, _CHARACTERS = 4, 160
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64)


class NearPair(msgspec.Struct, frozen=True):
    """Two rows of nearly the same text; the one of the earlier split, or of the earlier row, first."""

    splits: tuple[str, str]
    ids: tuple[str, str]
    labels: tuple[str | None, str | None]
    texts: tuple[str, str]
    similarity: float


class NearDuplicates(msgspec.Struct, frozen=True):
    """Distinct texts that have a near duplicate, as `how` defines it.

    `within` counts those nearly like an earlier one of their split; `across`, under `train–test`, those of test
    nearly like one of train; `conflicting_labels`, of both, those whose nearest has another label. `compared` is how
    many distinct texts of each split were looked at, of all its `texts`; `examples` are some pairs across splits.
    """

    how: str
    compared: dict[str, int]
    within: dict[str, int]
    across: dict[str, int]
    conflicting_labels: int
    examples: list[NearPair]
    texts: dict[str, int] = {}


class Audit(msgspec.Struct, frozen=True):
    """What the audit found.

    `duplicates` and `within` count rows that repeat an earlier one; `across` counts distinct contents that
    stand in both splits; `conflicting_labels` counts contents that occur with several labels. `near` is null in
    what an older kdexport wrote.
    """

    rows: int
    duplicates: int
    conflicting_labels: int
    within: dict[str, int]
    across: dict[str, int]
    dropped: dict[str, int]
    near: NearDuplicates | None = None


def audit(
    splits: dict[str, Rows], content: Callable[[dict[str, Any]], str], drop: bool
) -> tuple[dict[str, Rows], Audit]:
    """Count duplicates by `content`; `drop` from train those of validation and test, from validation those of test."""
    seen = {split: Counter(content(row) for row in rows) for split, rows in splits.items()}
    labels: dict[str, set[str | None]] = defaultdict(set)
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
        conflicting_labels=sum(len(found - {None}) > 1 for found in labels.values()),
        within={split: counts.total() - len(counts) for split, counts in seen.items()},
        across=across,
        dropped=dropped,
    )


def near_duplicates(
    splits: dict[str, Rows], content: Callable[[dict[str, Any]], str]
) -> tuple[NearDuplicates, list[NearPair]]:
    """Count texts that are nearly like another, and pair each with its nearest in every other split.

    Candidates come from MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman, Mining of Massive
    Datasets, ch. 3) and are then compared exactly. Equal contents are not counted: `audit` does that.

    Returns:
        The counts with some examples, and all pairs across splits, at most one for each text and earlier split.
    """
    distinct = {split: _distinct(rows, content) for split, rows in splits.items()}
    looked_at = [(split, *found[i]) for split, found in distinct.items() for i in sampled(len(found), _MOST)]
    pairs = []
    for i, j, similarity in _nearest([split for split, _, _ in looked_at], [text for _, text, _ in looked_at]):
        (late, text, row), (early, other, first) = looked_at[i], looked_at[j]
        ids, labels = (first["id"], row["id"]), (first["label"], row["label"])
        pairs.append(NearPair((early, late), ids, labels, (_short(other), _short(text)), round(similarity, 3)))
    names = list(splits)
    counts = Counter(pair.splits for pair in pairs)
    beyond = [pair for pair in pairs if pair.splits[0] != pair.splits[1]]
    found = NearDuplicates(
        how=f"Jaccard index of {_SIMILAR} or more over runs of {_RUN} characters, without regard to case and spacing",
        compared=dict(Counter(split for split, _, _ in looked_at)),
        within={split: counts[split, split] for split in names},
        across={f"{early}–{late}": counts[early, late] for i, early in enumerate(names) for late in names[i + 1 :]},
        conflicting_labels=len({pair.ids[1] for pair in pairs if _conflict(pair)}),
        examples=_examples(beyond),
        texts={split: len(found) for split, found in distinct.items()},
    )
    return found, beyond


def shingles(text: str) -> Array:
    """The distinct runs of four characters of a text as 64-bit hashes: uint64 [S], ascending, at least one.

    Case and kinds of white space make no difference; a blank is put at both ends, so that words at the edges count
    like others. The hash is multilinear (Carter and Wegman 1979), modulo 2⁶⁴.
    """
    plain = f" {' '.join(text.casefold().split())} ".ljust(_RUN)
    points = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return np.unique(sliding_window_view(points, _RUN) @ _MULTIPLIERS)


def jaccard(a: Array, b: Array) -> float:
    """What two sets share, of all that they hold (Jaccard 1901); sets as ascending arrays [S] and [T]."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _distinct(rows: Rows, content: Callable[[dict[str, Any]], str]) -> list[tuple[str, dict[str, Any]]]:
    """Each content with its first row."""
    return list({content(row): row for row in reversed(rows)}.items())[::-1]


def _nearest(splits: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """(text, the nearest one before it, how similar), for each text and each split, where that is similar enough."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ModuleNotFoundError:
        raise MissingPackage("datasketch", "distill") from None
    size = _BANDS * _BAND
    # the upper halves of the hashes: in a sum of products modulo 2⁶⁴ the lower bits are the weaker ones
    hashes = ((shingles(text) >> np.uint64(32)).tolist() for text in texts)
    sketches = MinHash.bulk(hashes, num_perm=size, hashfunc=int)
    indexes = {split: MinHashLSH(num_perm=size, params=(_BANDS, _BAND)) for split in dict.fromkeys(splits)}
    remembered = lru_cache(4096)(shingles)
    for i, (split, text, sketch) in enumerate(zip(splits, texts, sketches, strict=True)):
        for index in indexes.values():  # those of later splits are empty as yet
            candidates = sorted(j for j in index.query(sketch) if texts[j] != text)
            if index is indexes[split] and len(candidates) < _CROWD:  # who has a crowd before them adds nothing to it
                index.insert(i, sketch, check_duplication=False)
            if len(candidates) > _EXACT:
                candidates.sort(key=lambda j: -sketch.jaccard(sketches[j]))
            compared = [(jaccard(remembered(text), remembered(texts[j])), j) for j in candidates[:_EXACT]]
            similarity, j = max(compared, key=lambda one: (one[0], -one[1]), default=(0.0, -1))
            if similarity >= _SIMILAR:
                yield i, j, similarity


def _examples(pairs: list[NearPair]) -> list[NearPair]:
    """Some pairs of each two splits: labels that conflict first, then the most similar."""
    by_splits: dict[tuple[str, str], list[NearPair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: (not _conflict(pair), -pair.similarity)):
        by_splits[pair.splits].append(pair)
    return [pair for key in sorted(by_splits) for pair in by_splits[key][:_EXAMPLES]]


def _conflict(pair: NearPair) -> bool:
    return None not in pair.labels and pair.labels[0] != pair.labels[1]


def _short(text: str) -> str:
    line = " ".join(text.replace("\x1f", " ‖ ").split())
    return line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS].rstrip()} …"
