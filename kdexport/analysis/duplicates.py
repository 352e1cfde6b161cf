"""Exact and near duplicates, within and across splits: exact ones are removed from training, near ones are reported.

Test rows that occur in train, exactly or nearly, measure memorisation instead of generalisation.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations

import msgspec
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdexport.analysis import sampled, shortened
from kdexport.errors import MissingPackage
from kdexport.tasks.config import Row
from kdexport.tasks.metrics import Array

Splits = Mapping[str, Sequence[Row]]
Content = Callable[[Row], str]

# 4-grams: at 0.8 a sentence of eight words may differ in a letter, an ending or a short word, but not in a word more.
# (On clinc150's test texts, 5-grams found half as many; 3-grams match the same words in another order.)
_RUN, _SIMILAR = 4, 0.8
# 21 bands of 6: of pairs with similarity 0.8, 99.8 % become candidates, with 0.4, 8 %; candidates are verified exactly.
_BANDS, _BAND = 21, 6
# Limits on time and memory, for template texts and millions of rows: candidates per text, the likeliest of them that
# are verified, and sampled texts of all splits (10 kB and, for 20 words, 0.2 ms each).
_CROWD, _EXACT, _MOST = 100, 10, 60_000
_EXAMPLES, _CHARACTERS = 4, 160
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64)


class NearPair(msgspec.Struct, frozen=True):
    """Two rows of nearly the same text; the one of the earlier split, or the earlier row, comes first."""

    splits: tuple[str, str]
    ids: tuple[str, str]
    labels: tuple[str | None, str | None]
    texts: tuple[str, str]
    similarity: float


class NearDuplicates(msgspec.Struct, frozen=True):
    """Distinct texts that have a near duplicate, as defined in `how`.

    `within` counts texts similar to an earlier one of their split; `across`, under `train–test`, texts of test similar
    to one of train; `conflicting_labels`, in both, those whose nearest neighbour has another label. `compared` is the
    sample size of each split, out of all its `texts`; `examples` are some pairs across splits.
    """

    how: str
    compared: dict[str, int]
    within: dict[str, int]
    across: dict[str, int]
    conflicting_labels: int
    examples: list[NearPair]
    texts: dict[str, int] = {}


class Audit(msgspec.Struct, frozen=True):
    """Duplicates and label conflicts in the data.

    `duplicates` and `within` count rows that repeat an earlier one; `across` counts distinct contents in both splits;
    `conflicting_labels` counts contents with several labels. `near` is null in files of older versions.
    """

    rows: int
    duplicates: int
    conflicting_labels: int
    within: dict[str, int]
    across: dict[str, int]
    dropped: dict[str, int]
    near: NearDuplicates | None = None


def keys_of(rows: Iterable[Row], content: Content) -> Array:
    """Return a hash of each row's content: uint64 [N].

    Of a million contents two share one with a probability of 3e-8.
    """
    texts = (content(row).encode("utf-8", "surrogatepass") for row in rows)
    return np.frombuffer(b"".join(_hashed(text) for text in texts), np.uint64)


def first_of_each(keys: Array) -> Array:
    """Return where each distinct key occurs first, ascending."""
    return np.sort(np.unique(keys, return_index=True)[1])


def audit(
    splits: Splits, content: Content, drop: bool, *, shared: Callable[[Row], bool] = lambda row: False
) -> tuple[dict[str, Array], Audit]:
    """Count duplicates by `content`; return the places of the rows of each split that stay.

    With `drop`, contents of later splits are dropped, so that test stays complete. Rows that the splits have in common
    by purpose, `shared`, are no duplicates.
    """
    keys = {split: keys_of(rows, content) for split, rows in splits.items()}
    own = {split: np.array([not shared(row) for row in rows], dtype=bool) for split, rows in splits.items()}
    distinct = {split: np.unique(found[own[split]]) for split, found in keys.items()}
    across = {
        f"{early}–{late}": len(np.intersect1d(distinct[early], distinct[late], assume_unique=True))
        for early, late in combinations(splits, 2)
    }
    names, kept = list(splits), {split: np.arange(len(found)) for split, found in keys.items()}
    dropped = dict[str, int]()
    for i, early in enumerate(names[:-1] if drop else ()):
        later = np.concatenate([distinct[late] for late in names[i + 1 :]])
        kept[early] = np.flatnonzero(~(own[early] & np.isin(keys[early], later)))
        dropped[early] = len(keys[early]) - len(kept[early])
    every = np.concatenate([found[own[split]] for split, found in keys.items()])
    n = len(every)
    within = {split: int(own[split].sum()) - len(distinct[split]) for split in keys}
    labels = (row["label"] for split, rows in splits.items() for row, o in zip(rows, own[split], strict=True) if o)
    conflicting = _conflicting(every, labels)
    return kept, Audit(n, n - len(np.unique(every)), conflicting, within, across, dropped)


def near_duplicates(splits: Splits, content: Content) -> tuple[NearDuplicates, list[NearPair]]:
    """Count texts that are nearly like another, with examples; pair each with its nearest in every other split.

    Candidates come from MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman, Mining of Massive
    Datasets, ch. 3), and are verified exactly. Equal contents are not counted: `audit` does that.
    """
    distinct = {split: first_of_each(keys_of(rows, content)) for split, rows in splits.items()}
    most = _level([len(found) for found in distinct.values()], _MOST)
    chosen = ((split, splits[split][f[i]]) for split, f in distinct.items() for i in sampled(len(f), most))
    looked_at = [(split, content(row), row) for split, row in chosen]
    pairs = []
    for i, j, similarity in _nearest([split for split, _, _ in looked_at], [text for _, text, _ in looked_at]):
        (late, text, row), (early, other, first) = looked_at[i], looked_at[j]
        ids, labels = (first["id"], row["id"]), (first["label"], row["label"])
        shown = (_shown(other), _shown(text))
        pairs.append(NearPair((early, late), ids, labels, shown, round(similarity, 3)))
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
    """Return a text's distinct 4-grams of characters as 64-bit hashes: uint64 [S], ascending, at least one.

    Case and kinds of white space are ignored; a blank is added at both ends, so that words at the edges count like
    others. The hash is multilinear (Carter and Wegman 1979), modulo 2⁶⁴.
    """
    plain = f" {' '.join(text.casefold().split())} ".ljust(_RUN)
    points = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return np.unique(sliding_window_view(points, _RUN) @ _MULTIPLIERS)


def jaccard(a: Array, b: Array) -> float:
    """Return the Jaccard index (Jaccard 1901) of two sets, given as ascending arrays [S] and [T]."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _level(sizes: Sequence[int], most: int) -> int:
    """Return how many of each group make at most `most` in all, where small groups are taken whole."""
    for left, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        if size * left >= most:
            return most // left
        most -= size
    return max(sizes)


def _hashed(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _conflicting(keys: Array, labels: Iterable[object]) -> int:
    """Count the contents that have several labels; None is no label."""
    none = _hashed(b"")
    each = b"".join(none if label is None else _hashed(msgspec.json.encode(label)) for label in labels)
    pairs = np.stack([keys, np.frombuffer(each, np.uint64)], axis=1)
    pairs = np.unique(pairs[pairs[:, 1] != np.frombuffer(none, np.uint64)[0]], axis=0)
    return int((np.unique(pairs[:, 0], return_counts=True)[1] > 1).sum())


def _nearest(splits: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Yield (text, the nearest earlier one, similarity) for each text and split, where it is similar enough."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ModuleNotFoundError:
        raise MissingPackage("datasketch", "distill") from None
    size = _BANDS * _BAND
    # the upper halves of the hashes: the lower bits of a sum of products modulo 2⁶⁴ are weaker
    hashes = ((shingles(text) >> np.uint64(32)).tolist() for text in texts)
    sketches = MinHash.bulk(hashes, num_perm=size, hashfunc=int)
    indexes = {split: MinHashLSH(num_perm=size, params=(_BANDS, _BAND)) for split in dict.fromkeys(splits)}
    remembered = lru_cache(4096)(shingles)
    for i, (split, text, sketch) in enumerate(zip(splits, texts, sketches, strict=True)):
        for index in indexes.values():  # those of later splits are still empty
            candidates = sorted(j for j in index.query(sketch) if texts[j] != text)
            if index is indexes[split] and len(candidates) < _CROWD:  # stop indexing once a bucket is full
                index.insert(i, sketch, check_duplication=False)
            if len(candidates) > _EXACT:
                candidates.sort(key=lambda j: -sketch.jaccard(sketches[j]))
            compared = [(jaccard(remembered(text), remembered(texts[j])), j) for j in candidates[:_EXACT]]
            similarity, j = max(compared, key=lambda one: (one[0], -one[1]), default=(0.0, -1))
            if similarity >= _SIMILAR:
                yield i, j, similarity


def _examples(pairs: list[NearPair]) -> list[NearPair]:
    """Return some pairs for each two splits: conflicting labels first, then the most similar."""
    by_splits: dict[tuple[str, str], list[NearPair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: (not _conflict(pair), -pair.similarity)):
        by_splits[pair.splits].append(pair)
    return [pair for key in sorted(by_splits) for pair in by_splits[key][:_EXAMPLES]]


def _conflict(pair: NearPair) -> bool:
    return None not in pair.labels and pair.labels[0] != pair.labels[1]


def _shown(text: str) -> str:
    return shortened(text.replace("\x1f", " ‖ "), _CHARACTERS)
