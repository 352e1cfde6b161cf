"""Sentence embedding: a text → one vector, judged by scored pairs, by a search, or by the teacher's neighbours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import numpy as np

from kdexport.errors import ArtifactError, DataError
from kdexport.tasks.base import Objective, Task
from kdexport.tasks.card import Card
from kdexport.tasks.config import Function, Row
from kdexport.tasks.inputs.texts import Texts
from kdexport.tasks.judgements import Judgement, judgement, pairs_of, score_of, searched, written
from kdexport.tasks.menus import LAYERS, OF_LAYERS, TEXTS
from kdexport.tasks.metrics import Array, Keeps, Metric, mid_ranks, pearson, products
from kdexport.tasks.rankings import mrr, ndcg, recall
from kdexport.tasks.vectors import DTYPES, EmbeddingDtype, cosines, decoded, encoded, overlap, shortened

_HIGHEST = 5.0  # of a pair's score
_CODE = '\nmodel = kdexport.load("path/to/this/folder")\nmodel.embed(["a sentence", "another one"])  # float32 [2, D]'
_ELSEWHERE = """from sentence_transformers import SentenceTransformer  # with its extra `onnx`

model = SentenceTransformer("path/to/this/folder", backend="onnx", model_kwargs={{"file_name": "{file}"}})
model.encode(["a sentence", "another one"])"""


class Vector(msgspec.Struct, frozen=True):
    """The vector of a text, float32 [D]."""

    values: Array

    def to_dict(self, scores: bool) -> dict[str, Any]:
        return {"embedding": [round(float(value), 7) for value in self.values]}

    def __repr__(self) -> str:
        return f"Vector({len(self.values)} dimensions)"


class SentenceEmbedding(Texts):
    """Rows `{"text": …, "prompt": …, "label": …}` → input ids → vectors [N, D].

    Without labels a model is judged by how many of each text's ten nearest its teacher has as well.
    """

    name: ClassVar = "sentence-embedding"
    objective: ClassVar[Objective] = "vectors"
    function: ClassVar[Function] = "none"
    metric: ClassVar = Metric("agreement with the teacher")
    card: ClassVar = Card(
        "sentence-similarity", "ORTModelForFeatureExtraction", _CODE,
        "sentence-transformers", _ELSEWHERE, ("sentence-transformers", "sentence-similarity", "feature-extraction"),
    )  # fmt: skip
    # Searches by int8 files whose ten nearest are fp32's by nine in ten find the same: docs/decisions.md.
    int8: ClassVar = Keeps(0.9, "has {:.1%} of fp32's ten nearest in {:,} rows")
    menu: ClassVar = TEXTS._replace(
        students=LAYERS | {"model", "narrow", "bag"},
        instead="Take spread:3, tiny, 3x192 or bag",
        default="spread:3",
        ladder=("bag", "tiny", "2x256", "spread:2", "spread:3"),
        losses=("cosine", "similarity", "mse", *OF_LAYERS),
        temperature=0.05,
        unused=dict(TEXTS.unused)
        | {
            "teacher.train": "Remove it: a student learns from the teacher's vectors as they are",
            **dict.fromkeys(("teacher.passes", "teacher.noise", "teacher.combine"), "Remove it: vectors are joined"),
            "student.embedding": "Remove it: student.dimensions is the width of the vectors",
            "distill.baseline": "Remove it: there are no labels to learn from",
        },
    )
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "content", "query", "question", "title", "message", "body", "document"),
        "label": ("score", "similarity", "similarity_score", "label"),
    }
    pairs: ClassVar = True
    auto_class: ClassVar = "AutoModel"
    heads: ClassVar = ()
    stands_for: ClassVar = ("bert", "BertModel")
    protocols: ClassVar = frozenset({"tei", "openai"})
    output: ClassVar = "sentence_embedding"
    also: ClassVar = ("last_hidden_state",)
    has_labels: ClassVar = False
    has_names: ClassVar = False
    embeds: ClassVar = True
    labels_judge: ClassVar = True
    adds_up: ClassVar = False
    usual_length: ClassVar = 512
    searches: ClassVar = False

    @classmethod
    def kinds(cls) -> dict[str, type[Task]]:
        return {kind.problem: kind for kind in (SentenceEmbedding, *_JUDGED)}

    @classmethod
    def of(cls, config: Any) -> type[Task]:
        return cls.kinds().get(config.embedding.problem if config.embedding else "", cls)

    @classmethod
    def load(cls, folder: Path) -> Self:
        found = super().load(folder)
        if found.config.embedding is None:
            raise ArtifactError(f"{folder}: the task {cls.name} lacks the settings of its vectors", "Pack it again")
        return found

    @property
    def width(self) -> int:
        """The dimensions D of a vector."""
        return self.config.embedding.width if self.config.embedding else 0

    @property
    def answer_shape(self) -> tuple[int, ...]:
        return (self.width,)

    def axes(self) -> dict[str, dict[int, str]]:
        return super().axes() | {self.also[0]: {0: "batch_size", 1: "sequence_length"}}

    # --- rows

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        row, label = row | {"label": None}, row["label"]  # a class of a text judges no vector
        if isinstance(label, Mapping):  # as `data.sources` reads a folder in BEIR's layout
            found = msgspec.convert(label, Judgement)
            row["prompt"] = "document" if found.document else "query"
            row["label"] = written(found) if cls.searches else None
        return row

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        return Texts.check(row, max_chars, needs_label=False)

    @classmethod
    def parts(cls, row: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """Take each side of a pair as a row."""
        second = row.pop("text_pair", None)
        if second is None:
            return [row | {"id": name}]
        score = row["label"]
        label = None if score is None else written(Judgement(pair=name, score=float(score)))
        sides = enumerate((row["text"], second), 1)
        return [row | {"id": f"{name}.{i}", "text": text, "label": label} for i, text in sides]

    @staticmethod
    def content(row: Row) -> str:
        prompt = row.get("prompt")
        return f"{prompt}\x1e{row['text']}" if prompt else str(row["text"])

    likeness = staticmethod(Texts.title)  # whatever prompt a text is behind

    @classmethod
    def unit(cls, row: Row) -> str:
        label = row.get("label")
        return (judgement(label).pair if label else "") or cls.content(row)

    @staticmethod
    def shared(row: Row) -> bool:
        return bool(row.get("label")) and bool(judgement(row["label"]).document)

    def row(self, given: object) -> dict[str, Any]:
        if not isinstance(given, str):
            what = "a pair of texts" if isinstance(given, tuple) else f"no text but {type(given).__name__}"
            raise DataError(f"it is {what}", "Give each text by itself")
        return {"text": super().row(given)["text"]}

    def _tokenized(self, rows: Sequence[Row]) -> Any:
        return super()._tokenized([{**row, "text": self.prompted(row)} for row in rows] if self._prompts else rows)

    @property
    def _prompts(self) -> Mapping[str, str]:
        return self.config.embedding.prompts if self.config.embedding else {}

    def cost(self, row: Row) -> int:
        return super().cost({"text": self.prompted(row)})

    def is_cut(self, row: Row) -> bool:
        return "text" in row and super().is_cut({"text": self.prompted(row)})

    def check_prompt(self, name: str | None) -> None:
        """Raise DataError where the model has no prompt of this name."""
        if name is not None and not {name, *(_DOCUMENT if name == "document" else ())} & self._prompts.keys():
            there = f"Its prompts are {', '.join(self._prompts)}" if self._prompts else "It has none: leave it out"
            raise DataError(f"the model has no prompt {name!r}", there)

    def prompted(self, row: Row) -> str:
        """Return a row's text behind the prompt that it names, else behind the model's default one."""
        named = row.get("prompt") or (self.config.embedding.default_prompt if self.config.embedding else "")
        known = self._prompts
        # Teachers call the prompt of a document as they like.
        name = next((n for n in (named, *(_DOCUMENT if named == "document" else ())) if n in known), None)
        return (known[name] if name else "") + str(row["text"])

    # --- vectors

    def pack(self, logits: Array) -> Array:
        """In half precision, which halves the disk that they take."""
        return logits.astype(np.float16)

    def unpack(self, packed: Array) -> Array:
        return packed.astype(np.float32)

    def decode(self, logits: Array, rows: Sequence[Row] = ()) -> list[Vector]:
        return [Vector(vector) for vector in logits]

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        return np.ones(len(logits))

    def agrees(self, logits: Array, reference: Array) -> Array:
        """The fraction of each row's ten nearest among these rows that both have: vectors may differ in width."""
        return overlap(logits, reference)

    def compared(self, logits: Array, reference: Array) -> dict[str, float]:
        """Cosines to the teacher's vectors, where widths are equal."""
        if logits.shape != reference.shape:
            return {}
        found = cosines(logits, reference)
        return {"cosine to the teacher": float(found.mean()), "its 1st percentile": float(np.percentile(found, 1))}

    def difference(self, logits: Array, reference: Array) -> float:
        """Max |Δ| of a component, of vectors longer than 1 as a fraction of their length."""
        lengths = np.linalg.norm(reference, axis=-1, keepdims=True)
        return float((np.abs(logits - reference) / np.maximum(lengths, 1.0)).max())

    def label_array(self, rows: Iterable[Row]) -> Array:
        """Zeros: no loss reads them."""
        return np.zeros(len(list(rows)), dtype=np.int64)


class Similarity(SentenceEmbedding):
    """Pairs with scores from 0 to 5: Spearman's correlation of cosines with scores."""

    problem: ClassVar = "similarity"
    metric: ClassVar = Metric("Spearman correlation")

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        scored = [row for row in rows if row.get("text_pair") and not isinstance(score_of(row.get("label")), str)]
        return "there are pairs with scores" if scored else ""

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        label = row["label"]
        if isinstance(label, Mapping) or row.get("text_pair") is None or label in (None, ""):
            return super().canonical(row)
        score = score_of(label)
        if isinstance(score, str):
            return f"score {label!r} is no number"
        if not 0 <= score <= _HIGHEST:
            return f"score {score:g} is not between 0 and {_HIGHEST:g}"
        return row | {"label": f"{score:g}"}

    @classmethod
    def misfit(cls, rows: Sequence[Row]) -> str:
        pairs = pairs_of(rows)
        if not len(pairs):
            return "it holds no pair of texts with a score"
        return "all its pairs have the same score" if np.ptp(pairs[:, 2]) == 0 else ""

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Products of the ranks of each pair's cosine and score, in the pair's first row: float64 [N, 6]."""
        return self._stats(logits, rows, mid_ranks)

    def _stats(self, logits: Array, rows: Sequence[Row], rank: Callable[[Array], Array]) -> Array:
        found, pairs = np.zeros((len(rows), 6)), pairs_of(rows)
        if len(pairs):
            a, b = pairs[:, :2].astype(np.int64).T
            x, y = rank(cosines(logits[a], logits[b]).astype(np.float64)), rank(pairs[:, 2])
            found[a] = products(x - x.mean(), y - y.mean())
        return found

    def value(self, sums: Array) -> Array:
        return pearson(sums)

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        exact = float(self.value(self._stats(logits, rows, np.asarray).sum(axis=0)))
        return {"Pearson correlation": exact} | _smaller(self, logits, rows)


class Retrieval(SentenceEmbedding):
    """Queries, documents and judgements: nDCG at 10, the mean over the queries."""

    problem: ClassVar = "retrieval"
    metric: ClassVar = Metric("nDCG@10")
    searches: ClassVar = True
    _of: ClassVar[Callable[[Array, Array], Array]] = staticmethod(ndcg)

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        return "there are documents to search" if any(isinstance(row.get("label"), Mapping) for row in rows) else ""

    @classmethod
    def misfit(cls, rows: Sequence[Row]) -> str:
        kinds = [judgement(row["label"]) for row in rows if row.get("label")]
        if not any(kind.document for kind in kinds):
            return "it holds no document"
        relevant = any(gain > 0 for kind in kinds for gain in kind.gains.values())
        return "" if relevant else "it holds no query with a relevant document"

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """(value, 1) at each query's row: float64 [N, 2]."""
        return searched(logits, rows, type(self)._of)

    def value(self, sums: Array) -> Array:
        return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1e-12))

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        others = {kind.metric.name: kind._of for kind in _SEARCHES if kind.metric != self.metric}
        found = {name: float(self.value(searched(logits, rows, of).sum(axis=0))) for name, of in others.items()}
        return found | _smaller(self, logits, rows)


class RetrievalMRR(Retrieval):
    """The same, judged by the reciprocal rank of the first relevant document."""

    problem: ClassVar = "retrieval-mrr"
    metric: ClassVar = Metric("MRR@10")
    _of: ClassVar[Callable[[Array, Array], Array]] = staticmethod(mrr)


class RetrievalRecall(Retrieval):
    """The same, judged by the fraction of the relevant documents among the first 100."""

    problem: ClassVar = "retrieval-recall"
    metric: ClassVar = Metric("recall@100")
    _of: ClassVar[Callable[[Array, Array], Array]] = staticmethod(recall)


_SEARCHES = (Retrieval, RetrievalMRR, RetrievalRecall)
_JUDGED = (Similarity, *_SEARCHES)
_DOCUMENT = ("passage", "doc", "corpus")


def _smaller(task: SentenceEmbedding, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
    """Return the metric of vectors in smaller formats, and of their first half and quarter."""

    def of(vectors: Array) -> float:
        return float(task.value(task.stats(vectors, rows).sum(axis=0)))

    width, found = logits.shape[1], dict[str, float]()
    others: list[EmbeddingDtype] = [dtype for dtype in DTYPES if dtype != "float"]
    for dtype in others:
        found[f"with {dtype} vectors"] = of(decoded(encoded(logits, dtype), dtype, width))
    for part in (2, 4):
        found[f"with {width // part} dimensions"] = of(shortened(logits, max(1, width // part)))
    return found
