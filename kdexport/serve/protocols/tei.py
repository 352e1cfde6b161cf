"""text-embeddings-inference's `/predict`: texts in, flat lists of labels with scores out.

Source: its router/src/http/types.rs. A list of two texts is one pair there, and batches are lists of lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from kdexport import __version__
from kdexport.serve.http import Refused, encode
from kdexport.serve.protocols.huggingface import TaskProtocol, classes, decoded
from kdexport.serve.registry import Result, Version
from kdexport.serve.settings import Settings

Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=2)]


class PredictRequest(msgspec.Struct, frozen=True):
    """A text, a pair as a list of two, or a batch of such lists."""

    inputs: str | list[str | Texts]
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    raw_scores: bool = False


class Query(NamedTuple):
    """A parsed request."""

    rows: list[dict[str, Any]]
    single: bool
    raw_scores: bool
    uncut: bool


_decode = msgspec.json.Decoder(PredictRequest).decode


def parse(body: bytes) -> Query:
    """Parse a request."""
    asked = decoded(_decode, body)
    kinds = {str} if isinstance(asked.inputs, str) else set(map(type, asked.inputs))
    if len(kinds) > 1:  # is a lone text beside a pair half a pair, or a row?
        raise Refused(422, "a batch is a list of lists, each of one text or two")
    single = kinds <= {str}
    batch = [asked.inputs] if single else asked.inputs
    return Query([_row(one) for one in batch], single, asked.raw_scores, asked.truncate is False)


def render(version: Version, query: Query, results: Sequence[Result]) -> bytes:
    """Return a list of all labels with scores, best first; a list of such lists for a batch."""
    found = classes(version, results, "none" if query.raw_scores else None, None)
    return encode(found[0] if query.single else found)


PROTOCOL = TaskProtocol(
    parse, lambda version, query: len(query.rows) * len(version.task.labels), render, "give fewer texts"
)


def info(version: Version, settings: Settings) -> dict[str, Any]:
    """`GET /info`."""
    labels = version.task.labels
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return {
        "model_id": version.name,
        "model_sha": version.version,
        "model_dtype": version.variant,
        "model_type": {"classifier": names},
        "max_input_length": version.task.config.max_length,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_batch_requests": settings.max_batch,
        "max_client_batch_size": settings.max_rows,
        "auto_truncate": True,
        "version": __version__,
    }


def _row(one: str | list[str]) -> dict[str, Any]:
    if isinstance(one, str):
        return {"text": one}
    if not 1 <= len(one) <= 2:
        raise Refused(422, "a list of texts is one text or a pair; a batch is a list of such lists")
    return {"text": one[0]} if len(one) == 1 else {"text": one[0], "text_pair": one[1]}
