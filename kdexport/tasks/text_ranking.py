"""Ranking: a query and a passage → the passage's score; metrics and losses are of the passages of one query."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from kdexport.errors import DataError, counted
from kdexport.tasks.base import Objective, Task
from kdexport.tasks.card import Card
from kdexport.tasks.config import Function, Row
from kdexport.tasks.inputs.texts import Texts
from kdexport.tasks.menus import OF_LAYERS
from kdexport.tasks.metrics import Array, Metric
from kdexport.tasks.rankings import mrr, ndcg
from kdexport.tasks.text_classification import TextRegression

# From so many pairs of passages whose order is known, a teacher that orders fewer than this fraction is near chance.
_PAIRS, _CHANCE = 100, 0.55
# Rows with so many passages a query are a ranking; others, such as premises with three hypotheses each, may not be.
_PASSAGES = 5
_CODE = """
model = kdexport.load("path/to/this/folder")
passages = ["a passage", "another passage"]
model.predict([("a query", passage) for passage in passages])  # the higher the score, the better the passage"""


class Score(msgspec.Struct, frozen=True):
    """A passage's score for its query: only the order of a query's scores has a meaning."""

    score: float

    def to_dict(self, scores: bool) -> dict[str, Any]:
        """Return the score, as text classification rounds it."""
        return {"score": round(self.score, 6)}


class TextRanking(TextRegression):
    """Rows `{"text": query, "text_pair": passage, "label": gain}` → the one logit; a query's rows are a ranking."""

    name: ClassVar = "text-ranking"
    problem: ClassVar = "single-label"
    objective: ClassVar[Objective] = "ranking"
    metric: ClassVar = Metric("nDCG@10")
    functions: ClassVar[frozenset[Function]] = frozenset({"none", "sigmoid"})
    menu: ClassVar = TextRegression.menu._replace(
        losses=("margin-mse", "listwise-kl", "mse", *OF_LAYERS),
        temperature=1.0,
        augment=False,
        teachers=frozenset({"torch", "adapter"}),
    )
    card: ClassVar = Card("text-ranking", "ORTModelForSequenceClassification", _CODE)
    columns: ClassVar = {
        "text": ("query", "question", "text"),
        "text_pair": ("passage", "document", "answer", "text_pair", "text", "sentence"),
        "label": ("gain", "relevance", "label", "score"),
    }
    marks: ClassVar = ("sentence_transformers", "sbert_ce_default_activation_function")
    protocols: ClassVar = frozenset({"tei", "rerank"})
    together: ClassVar = True
    adds_up: ClassVar = False

    @classmethod
    def kinds(cls) -> dict[str, type[Task]]:
        return {cls.problem: cls}

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        try:
            numbers = all(float(row["label"]) >= 0 for row in rows)
        except (TypeError, ValueError):
            return ""
        several = len(rows) >= _PASSAGES * len({row["text"] for row in rows})
        distinct = len({row["text_pair"] for row in rows if row["text_pair"]}) > 1
        return "a query has many passages, each with a number" if numbers and several and distinct else ""

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        return Texts.check({**row, "text_pair": row.get("text_pair") or ""}, max_chars, needs_label)

    @classmethod
    def unified(cls, rows: Sequence[Row]) -> tuple[Iterable[Row | str], str]:
        """Change nothing; count the queries that can't be judged, and refuse labels that rank nothing."""
        gains = _gains(rows)
        every = {gain for of_query in gains.values() for gain in of_query}
        if len(every) == 1:
            raise DataError(f"all labels are {every.pop():g}, so no passage is better", "Is --label the right column?")
        lone = [query for query, of_query in gains.items() if len(of_query) == 1]
        without = [query for query, of_query in gains.items() if len(of_query) > 1 and max(of_query) <= 0]
        found = [
            f"{counted(len(queries), 'query', 'queries')} with {what}, such as {queries[0][:60]!r}"
            for queries, what in ((lone, "one passage only"), (without, "no relevant passage"))
            if queries
        ]
        if gains and len(lone) + len(without) == len(gains):
            fix = "Give each query several passages, with a label above 0 for the relevant ones"
            raise DataError(f"no query can be judged: there are {'; '.join(found)}", fix)
        return rows, f"left out of the metric: {'; '.join(found)}" if found else ""

    @classmethod
    def misfit(cls, rows: Sequence[Row]) -> str:
        gains = _gains(rows)
        judges = any(len(of_query) > 1 and max(of_query) > 0 for of_query in gains.values())
        return "" if judges or not gains else "no query has several passages, one of them relevant"

    @staticmethod
    def unit(row: Row) -> str:
        return str(row["text"])

    def row(self, given: object) -> dict[str, Any]:
        found = super().row(given)
        if found["text_pair"] is None:
            raise DataError("it is one text, not a query and a passage", "Give pairs: (query, passage)")
        return found

    def examples(self) -> list[dict[str, Any]]:
        texts = [row["text"] for row in super().examples()]
        return [{"text": query, "text_pair": passage} for query, passage in zip(texts, reversed(texts), strict=True)]

    def decode(self, logits: Array, rows: Sequence[Row] = ()) -> list[Any]:
        return [Score(score) for score in self.scores(logits)[:, 0].tolist()]

    def agrees(self, logits: Array, reference: Array) -> Array:
        """As of numbers, apart from a shift of all, which changes no order."""
        return super().agrees(logits - logits.mean(axis=0), reference - reference.mean(axis=0))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """(gain, number of the query): float32 [N, 2]; the gain is NaN for a row without one."""
        rows, numbers = list(rows), dict[str, int]()
        gains = super().label_array(rows)
        queries = [numbers.setdefault(self.unit(row), len(numbers)) for row in rows]
        return np.concatenate([gains, np.array(queries, np.float32).reshape(-1, 1)], axis=1)

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """(nDCG@10, 1) in the first row of each query that can be judged: float64 [N, 2]."""
        found = np.zeros((len(rows), 2))
        for places, scores, gains in self._rankings(logits, rows):
            found[places[0]] = ndcg(scores, gains), 1
        return found

    def value(self, sums: Array) -> Array:
        """The mean over queries; 0 where none can be judged."""
        return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1))

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        ranks = [mrr(scores, gains) for _, scores, gains in self._rankings(logits, rows)]
        return {"MRR@10": float(np.mean(ranks))} if ranks else {}

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        """Return whether hardly more than half of a query's pairs of passages are in the right order."""
        right = pairs = 0
        for _, scores, gains in self._rankings(logits, rows):
            better = gains[:, None] > gains
            right, pairs = right + int((better & (scores[:, None] > scores)).sum()), pairs + int(better.sum())
        return pairs >= _PAIRS and right < _CHANCE * pairs

    def _rankings(self, logits: Array, rows: Sequence[Row]) -> Iterator[tuple[Array, Array, Array]]:
        """Yield the places, scores and gains of the rows of each query with several passages, one of them relevant."""
        labels = self.label_array(rows)
        order = np.argsort(labels[:, 1], kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(labels[order, 1])) + 1):
            gains = labels[places, 0].astype(np.float64)
            if len(places) > 1 and gains.max() > 0:
                yield places, logits[places, 0], gains


def _gains(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Return the labels of each query's passages."""
    gains: dict[str, list[float]] = {}
    for row in rows:
        if row["label"] is not None:
            gains.setdefault(row["text"], []).append(float(row["label"]))
    return gains
