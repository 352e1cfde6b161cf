"""Hugging Face's inference API: `{"inputs": …, "parameters": {…}}` in, the shape that its own client reads out.

Source: huggingface_hub's generated types and `InferenceClient`, which takes the first element of what comes back
for text classification: so one text is answered by a list in a list. text-embeddings-inference answers the same
request with a flat list, of which that client silently reads one label; its shape is served at `/predict`.

A task's parameters, its inputs and its answer stand together in a `TaskProtocol`.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from kdexport.serve.http import Refused, encode
from kdexport.serve.registry import Result, Version
from kdexport.tasks.base import Task

Function = Literal["softmax", "sigmoid", "none"]
# A whole number; 2.0 is one, too, to JSON Schema and to languages that have one kind of number.
Count = Annotated[float, msgspec.Meta(ge=1, le=2**31, multiple_of=1)]


class Pair(msgspec.Struct, frozen=True):
    """A pair of texts, as transformers' pipeline takes it."""

    text: str
    text_pair: str | None = None


class Parameters(msgspec.Struct, frozen=True):
    """How logits become the answer."""

    top_k: Count | None = None
    function_to_apply: Function | None = None


class ClassifyRequest(msgspec.Struct, frozen=True):
    """One text, a pair, or a list of either; every element of a list is answered by itself."""

    inputs: str | Pair | list[str | Pair]
    parameters: Parameters | None = None
    stream: bool | None = None


class FileRequest(msgspec.Struct, frozen=True):
    """A picture or a recording in base64."""

    inputs: str
    parameters: Parameters | None = None


class Query(NamedTuple):
    """A parsed request."""

    rows: list[dict[str, Any]]
    parameters: Parameters


class TaskProtocol(NamedTuple):
    """One task behind a path."""

    parse: Callable[[bytes], Any]
    entries: Callable[[Version, Any], int]  # labels or words that the answer may have
    render: Callable[[Version, Any, Sequence[Any]], bytes]
    less: str = "give fewer rows, or top_k"  # what helps against an answer that is too large


_decode = msgspec.json.Decoder(ClassifyRequest).decode
_decode_file = msgspec.json.Decoder(FileRequest).decode
_DEFAULT = Parameters()


def _parse_texts(body: bytes) -> Query:
    asked = decoded(_decode, body)
    _no_writing(asked.stream)
    inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    return Query([_row(one) for one in inputs], asked.parameters or _DEFAULT)


def _count_labels(version: Version, query: Query) -> int:
    labels = len(version.task.labels)
    return len(query.rows) * min(int(query.parameters.top_k or labels), labels)


def _count_words(version: Version, query: TagQuery) -> int:
    """Count the words of an answer, at most."""
    return sum(min(row["text"].count(" ") + 1, version.task.config.max_length) for row in query.rows)


def _render_classes(version: Version, query: Query, results: Sequence[Result]) -> bytes:
    return encode(_classes(version, query, results))


def _render_flat(version: Version, query: Query, results: Sequence[Result]) -> bytes:
    return encode(_classes(version, query, results)[0])


def _classes(version: Version, query: Query, results: Sequence[Result]) -> list[list[dict[str, Any]]]:
    top = query.parameters.top_k
    return classes(version, results, query.parameters.function_to_apply, int(top) if top else None)


class TagParameters(msgspec.Struct, frozen=True):
    """Whether the answer is single words (`none`) or entities; the ways to aggregate them are one here."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: tuple[str, ...] = ("O",)
    stride: int | None = None


class TagRequest(msgspec.Struct, frozen=True):
    """One text, or a list of them."""

    inputs: str | list[str]
    parameters: TagParameters | None = None
    stream: bool | None = None


class TagQuery(NamedTuple):
    """A parsed request; `texts` as they came in, `rows` with their words apart once they were checked."""

    rows: list[dict[str, Any]]
    texts: list[str]
    parameters: TagParameters
    single: bool


_decode_tags = msgspec.json.Decoder(TagRequest).decode


def _parse_tags(body: bytes) -> TagQuery:
    asked = decoded(_decode_tags, body)
    _no_writing(asked.stream)
    single = isinstance(asked.inputs, str)
    texts = [asked.inputs] if single else asked.inputs
    return TagQuery([{"text": text} for text in texts], texts, asked.parameters or TagParameters(), single)


def _render_tags(version: Version, query: TagQuery, results: Sequence[Result]) -> bytes:
    """Return entities with kind, score and place in characters; a list of such lists for a list of texts."""
    answers = version.task.decode(np.stack([result.logits for result in results]), query.rows)
    found = [_names(answer, text, query.parameters) for answer, text in zip(answers, query.texts, strict=True)]
    return encode(found[0] if query.single else found)


def _names(answer: Any, text: str, how: TagParameters) -> list[dict[str, Any]]:
    spans, at = [], 0
    for word in answer.words:
        at = max(text.find(word, at), at)
        spans.append((at, at := at + len(word)))
    if how.aggregation_strategy == "none":
        every = zip(answer.tags, answer.scores, answer.words, spans, strict=True)
        return [
            {"entity": tag, "score": score, "index": i, "word": word, "start": start, "end": end}
            for i, (tag, score, word, (start, end)) in enumerate(every, 1)
            if tag not in how.ignore_labels
        ]
    found = []
    for name in answer.entities:
        start, end = spans[name["start"]][0], spans[name["end"] - 1][1]
        found.append(name | {"word": text[start:end], "start": start, "end": end})
    return [name for name in found if name["entity_group"] not in how.ignore_labels]


def _parse_file(reads: str, body: bytes) -> Query:
    """Return a picture or a recording: the body itself, or base64 in JSON, as the client sends it with parameters."""
    if body.lstrip()[:1] != b"{":
        return Query([{reads: body}], _DEFAULT)
    asked = decoded(_decode_file, body)
    try:
        return Query([{reads: b64decode(asked.inputs, validate=True)}], asked.parameters or _DEFAULT)
    except ValueError:
        raise Refused(422, f"inputs must be the {reads} in base64") from None


_FILES = {
    modality: TaskProtocol(partial(_parse_file, modality), _count_labels, _render_flat)
    for modality in ("image", "audio")
}
_CLASSES = TaskProtocol(_parse_texts, _count_labels, _render_classes)
_TAGS = TaskProtocol(_parse_tags, _count_words, _render_tags)


def protocol_of(task: Task) -> TaskProtocol:
    """Return how a task that does not generate is asked and answered."""
    return _FILES.get(task.modality) or (_TAGS if task.has_words else _CLASSES)


def classes(
    version: Version, results: Sequence[Result], function: Function | None, top: int | None
) -> list[list[dict[str, Any]]]:
    """Return labels with scores of every row, best first; all of them unless `top` says how many."""
    labels = version.task.labels
    found = []
    for logits, scores in results:
        if function:
            scores = version.task.scores(logits[np.newaxis], function)[0]
        if top == 1:  # what is most often asked needs no order of the rest
            best = scores.argmax()
            found.append([{"label": labels[best], "score": float(scores[best])}])
            continue
        order = np.argsort(-scores, kind="stable")[:top]
        ordered = zip(order.tolist(), scores[order].tolist(), strict=True)
        found.append([{"label": labels[i], "score": score} for i, score in ordered])
    return found


def decoded(decode: Callable[[bytes], Any], body: bytes) -> Any:
    """Decode a body, or refuse one that is no JSON (400) or has another shape (422)."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise Refused(422, f"the request is not as it should be: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body can't be read as JSON: {error}") from None


def _no_writing(stream: bool | None) -> None:
    """Hugging Face's client says with every request to write, and with no other, whether tokens come one by one."""
    if stream is not None:
        raise Refused(422, "the model is no language model: it writes nothing, so there is no `stream`")


def _row(one: str | Pair) -> dict[str, Any]:
    if isinstance(one, str):
        return {"text": one}
    return {"text": one.text} if one.text_pair is None else {"text": one.text, "text_pair": one.text_pair}
