"""Labels by which vectors are judged: scores of pairs, and the relevant documents of queries."""

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
    wanted = [{name: gain for name, gain in label.gains.items() if name in place} for label in labels]
    queries = [i for i, gains in enumerate(wanted) if any(gain > 0 for gain in gains.values())]
    corpus, last = unit(logits[documents].astype(np.float32)), min(DEEPEST, len(documents)) - 1
    size = max(1, _MOST_SCORES // max(1, len(documents)))
    for part in (queries[start : start + size] for start in range(0, len(queries), size)):
        scores = unit(logits[part].astype(np.float32)) @ corpus.T
        for i, row in zip(part, scores, strict=True):
            gains = np.zeros(len(documents))
            for name, gain in wanted[i].items():
                gains[place[name]] = gain
            seen = ~(-row > np.partition(-row, last)[last]) | (gains > 0)  # sorting a whole corpus is slow
            found[i] = float(of(row[seen], gains[seen])), 1.0
    return found
