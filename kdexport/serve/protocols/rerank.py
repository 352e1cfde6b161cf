"""Rerankers: text-embeddings-inference's `/rerank`, and `/v1/rerank` as Cohere and Jina have it.

Source of the first: its router/src/http/types.rs. Scores are sigmoids of the logits in both, unless the raw ones are
asked for.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from kdexport.serve.http import encode
from kdexport.serve.protocols.huggingface import Count, decoded
from kdexport.serve.registry import Result, Version

_ENTRY = 80  # bytes of an entry without its text


class RerankRequest(msgspec.Struct, frozen=True):
    """A query, and the texts to sort by their scores for it."""

    query: str
    texts: Annotated[list[str], msgspec.Meta(min_length=1)]
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    raw_scores: bool = False
    return_text: bool = False


class Rank(msgspec.Struct):
    """The place of a text in the request, and its score."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class Document(msgspec.Struct, frozen=True):
    """A document as an object."""

    text: str


class RerankV1Request(msgspec.Struct, frozen=True):
    """A query, and the documents of which the `top_n` best are returned, all by default."""

    query: str
    documents: Annotated[list[str | Document], msgspec.Meta(min_length=1)]
    model: str | None = None
    top_n: Count | None = None
    return_documents: bool = False


class RankV1(msgspec.Struct):
    """The place of a document in the request, and its score."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankV1(msgspec.Struct):
    """The best documents, in order."""

    model: str
    results: list[RankV1]


class RerankQuery(NamedTuple):
    """A parsed request; `write` returns the answer to a model's name, places and scores, best first."""

    rows: list[dict[str, Any]]
    write: Callable[[str, list[tuple[int, float]]], Any]
    function: Literal["sigmoid", "none"] = "sigmoid"
    top: int | None = None
    with_texts: bool = False
    uncut: bool = False
    advice: str = "give fewer texts"

    def entries(self, version: Version) -> int:
        """Return the size of the response, in entries of labels."""
        texts = sum(len(row["text_pair"]) for row in self.rows) if self.with_texts else 0
        return len(self.rows) + texts // _ENTRY

    def render(self, version: Version, results: Sequence[Result]) -> bytes:
        """Return the scores, best first."""
        logits = np.stack([result.logits for result in results])
        scores = version.task.scores(logits, self.function)[:, 0]
        order = np.argsort(-scores, kind="stable")[: self.top].tolist()
        return encode(self.write(version.name, [(i, float(scores[i])) for i in order]))


def parse(body: bytes) -> RerankQuery:
    """Parse a request to `/rerank`."""
    asked = decoded(body, RerankRequest)

    def write(_: str, ranks: list[tuple[int, float]]) -> list[Rank]:
        return [Rank(i, score, asked.texts[i] if asked.return_text else UNSET) for i, score in ranks]

    function: Literal["sigmoid", "none"] = "none" if asked.raw_scores else "sigmoid"
    rows = _rows(asked.query, asked.texts)
    return RerankQuery(rows, write, function, with_texts=asked.return_text, uncut=asked.truncate is False)


def decode_v1(body: bytes) -> RerankV1Request:
    """Decode a request to `/v1/rerank`."""
    return decoded(body, RerankV1Request)


def parse_v1(asked: RerankV1Request, _: bytes) -> RerankQuery:
    """Parse a decoded request to `/v1/rerank`."""
    texts = [one if isinstance(one, str) else one.text for one in asked.documents]

    def write(model: str, ranks: list[tuple[int, float]]) -> RerankV1:
        shown = asked.return_documents
        return RerankV1(model, [RankV1(i, score, Document(texts[i]) if shown else UNSET) for i, score in ranks])

    top = int(asked.top_n) if asked.top_n else None
    return RerankQuery(_rows(asked.query, texts), write, top=top, with_texts=asked.return_documents)


def _rows(query: str, texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": query, "text_pair": text} for text in texts]
