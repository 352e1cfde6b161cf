"""What judges vectors: scores of pairs, and the documents that queries want, as labels of rows."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from kdexport.tasks.config import Row
from kdexport.tasks.metrics import Array
from kdexport.tasks.rankings import DEEPEST
from kdexport.tasks.vectors import unit

_MOST_SCORES = 2**24  # at once, to bound memory


class Judgement(msgspec.Struct, frozen=True, omit_defaults=True):
    """A row's `label`, as JSON: one side of a scored pair; a query with its relevant documents; or a document.

    `pair` is the id of the pair, whose score is from 0 to 5; `gains` of a query are by the id of a document.
    """

    pair: str = ""
    score: float = 0.0
    gains: dict[str, float] = {}
    document: str = ""


def judgement(label: str) -> Judgement:
    """Parse a row's label."""
    return msgspec.json.decode(label, type=Judgement)


def written(found: Judgement) -> str:
    """Return a judgement as a row's label."""
    return msgspec.json.encode(found).decode()


def score_of(label: Any) -> float | str:
    """Return the score that a label is, or the label as a text where it is no number."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return str(label)


def pairs_of(rows: Sequence[Row]) -> Array:
    """Return the places of both sides of each pair, and its score: float64 [P, 3]."""
    first: dict[str, int] = {}
    found = []
    for i, row in enumerate(rows):
        label = judgement(row["label"]) if row.get("label") else None
        if label and label.pair:
            if (before := first.pop(label.pair, None)) is None:
                first[label.pair] = i
            else:
                found.append((before, i, label.score))
    return np.array(found, dtype=np.float64).reshape(-1, 3)


def searched(logits: Array, rows: Sequence[Row], of: Callable[[Array, Array], Array]) -> Array:
    """Return (metric, 1) at the row of each query with a relevant document, zeros at others: float64 [N, 2]."""
    found = np.zeros((len(rows), 2))
    labels = [judgement(row["label"]) if row.get("label") else Judgement() for row in rows]
    documents = [i for i, label in enumerate(labels) if label.document]
    place = {labels[i].document: at for at, i in enumerate(documents)}
    queries = [
        i for i, label in enumerate(labels) if any(label.gains[name] > 0 for name in label.gains.keys() & place.keys())
    ]
    corpus, size = unit(logits[documents].astype(np.float32)), max(1, _MOST_SCORES // max(1, len(documents)))
    for part in (queries[start : start + size] for start in range(0, len(queries), size)):
        scores = unit(logits[part].astype(np.float32)) @ corpus.T
        for i, row in zip(part, scores, strict=True):
            gains = np.zeros(len(documents))
            for name in labels[i].gains.keys() & place.keys():
                gains[place[name]] = labels[i].gains[name]
            seen = _in_reach(row) | (gains > 0)
            found[i] = float(of(row[seen], gains[seen])), 1.0
    return found


def _in_reach(scores: Array) -> Array:
    """Return whether each of the scores [N] is among the highest, ties included: sorting all of a corpus is slow."""
    last = min(DEEPEST, len(scores)) - 1
    return np.asarray(~(-scores > np.partition(-scores, last)[last]))
