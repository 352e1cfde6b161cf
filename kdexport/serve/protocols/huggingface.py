"""Hugging Face's inference API: `{"inputs": …, "parameters": {…}}`.

Source: huggingface_hub's generated types and `InferenceClient`, which takes the first element of a text classification:
so the response to one text is a list in a list. text-embeddings-inference's flat list, of which that client silently
reads one label, is served at `/predict`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from kdexport.serve.http import Refused, encode
from kdexport.serve.registry import Result, Version
from kdexport.tasks.base import Task, can_transcribe
from kdexport.tasks.transcripts import Transcript

Asked = TypeVar("Asked")
Function = Literal["softmax", "sigmoid", "none"]
# An integer; 2.0 is one, too, in JSON Schema and in languages with one number type.
Count = Annotated[float, msgspec.Meta(ge=1, le=2**31, multiple_of=1)]


class Pair(msgspec.Struct, frozen=True):
    """A pair of texts, as transformers' pipeline takes it."""

    text: str
    text_pair: str | None = None


class Parameters(msgspec.Struct, frozen=True):
    """The function of the logits, and how many labels to return."""

    top_k: Count | None = None
    function_to_apply: Function | None = None


class ClassifyRequest(msgspec.Struct, frozen=True):
    """One text, a pair, or a list of either; each element has its own answer."""

    inputs: str | Pair | list[str | Pair]
    parameters: Parameters | None = None
    stream: bool | None = None


class FileRequest(msgspec.Struct, frozen=True):
    """An image or a recording in base64."""

    inputs: bytes
    parameters: Parameters | None = None


_ADVICE = "give fewer rows, or top_k"


class Query(NamedTuple):
    """A parsed request for labels and scores; the response to a `single` row is no list of rows."""

    rows: list[dict[str, Any]]
    function: Function | None = None  # None: the model's own
    top: int | None = None  # labels of a row; None: all
    single: bool = False
    uncut: bool = False  # refuse texts that would be truncated
    advice: str = _ADVICE  # on a response that would be too large

    def entries(self, version: Version) -> int:
        """Return the number of labels in the response."""
        labels = len(version.task.labels)
        return len(self.rows) * min(self.top or labels, labels)

    def render(self, version: Version, results: Sequence[Result]) -> bytes:
        """Return labels with scores of every row, best first."""
        labels = version.task.labels
        found = []
        for logits, scores, _ in results:
            if self.function:
                scores = version.task.scores(logits[np.newaxis], self.function)[0]
            if self.top == 1:  # the most frequent request needs no sort
                best = scores.argmax()
                found.append([{"label": labels[best], "score": float(scores[best])}])
                continue
            order = np.argsort(-scores, kind="stable")[: self.top]
            ordered = zip(order.tolist(), scores[order].tolist(), strict=True)
            found.append([{"label": labels[i], "score": score} for i, score in ordered])
        return encode(found[0] if self.single else found)


def _parse_texts(body: bytes) -> Query:
    asked = decoded(body, ClassifyRequest)
    _no_writing(asked.stream)
    inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    return _query([_row(one) for one in inputs], asked.parameters)


def _parse_file(reads: str, body: bytes) -> Query:
    """Parse an image or a recording: the body itself, or base64 in JSON."""
    if _is_file(body):
        return Query([{reads: body}], single=True)
    asked = decoded(body, FileRequest)
    return _query([{reads: asked.inputs}], asked.parameters, single=True)


def _is_file(body: bytes) -> bool:
    return body.lstrip()[:1] != b"{"


def _query(rows: list[dict[str, Any]], parameters: Parameters | None, single: bool = False) -> Query:
    given = parameters or Parameters()
    return Query(rows, given.function_to_apply, int(given.top_k) if given.top_k else None, single)


class TagParameters(msgspec.Struct, frozen=True):
    """Single words (`none`) or entities; the other aggregation strategies are the same here."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: tuple[str, ...] = ("O",)
    stride: int | None = None


class TagRequest(msgspec.Struct, frozen=True):
    """One text, or a list; each of its elements is a text, or a list of words."""

    inputs: str | list[str | list[str]]
    parameters: TagParameters | None = None
    stream: bool | None = None


class TagQuery(NamedTuple):
    """A parsed request: the `texts` (words joined by spaces), and `rows` split into words once checked."""

    rows: list[dict[str, Any]]
    texts: list[str]
    parameters: TagParameters
    single: bool
    uncut: bool = False
    advice: str = _ADVICE

    def entries(self, version: Version) -> int:
        """Return the most words of the response."""
        return sum(min(text.count(" ") + 1, version.task.config.max_length) for text in self.texts)

    def render(self, version: Version, results: Sequence[Result]) -> bytes:
        """Return entities with group, score and character offsets; a list of such lists for a list of texts."""
        answers = version.task.decode(np.stack([result.logits for result in results]), self.rows)
        found = [_names(answer, text, self.parameters) for answer, text in zip(answers, self.texts, strict=True)]
        return encode(found[0] if self.single else found)


class TranscribeParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for each word with its times, in seconds."""

    return_timestamps: bool | Literal["word"] | None = None


class TranscribeRequest(msgspec.Struct, frozen=True):
    """A recording in base64."""

    inputs: bytes
    parameters: TranscribeParameters | None = None


class Chunk(msgspec.Struct):
    """A word, and its start and end in seconds."""

    text: str
    timestamp: tuple[float, float]


class Transcribed(msgspec.Struct):
    """The text, and with `return_timestamps` its words."""

    text: str
    chunks: list[Chunk] | UnsetType = UNSET


class TranscribeQuery(NamedTuple):
    """A parsed request for the text of one recording; `write` returns the body of the response."""

    rows: list[dict[str, Any]]
    write: Callable[[Transcript], bytes]
    uncut: bool = False
    advice: str = "send a shorter recording"

    def entries(self, version: Version) -> int:
        """Return the most characters of the text."""
        return version.task.answer_shape[0]

    def render(self, version: Version, results: Sequence[Result]) -> bytes:
        """Return the text in the request's format."""
        task = version.task
        assert can_transcribe(task)
        return self.write(task.decode(results[0].logits[np.newaxis], self.rows)[0])


def _parse_recording(body: bytes) -> TranscribeQuery:
    if _is_file(body):
        return TranscribeQuery([{"audio": body}], partial(_transcribed, False))
    asked = decoded(body, TranscribeRequest)
    timestamps = bool(asked.parameters and asked.parameters.return_timestamps)
    return TranscribeQuery([{"audio": asked.inputs}], partial(_transcribed, timestamps))


def _transcribed(timestamps: bool, found: Transcript) -> bytes:
    chunks = [Chunk(word.word, (word.start, word.end)) for word in found.words]
    return encode(Transcribed(found.text, chunks if timestamps else UNSET))


AnyQuery = Query | TagQuery | TranscribeQuery


def _parse_tags(body: bytes) -> TagQuery:
    asked = decoded(body, TagRequest)
    _no_writing(asked.stream)
    given = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
    rows: list[dict[str, Any]] = [{"text": one} for one in given]
    texts = [one if isinstance(one, str) else " ".join(one) for one in given]
    return TagQuery(rows, texts, asked.parameters or TagParameters(), single=isinstance(asked.inputs, str))


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


def parser(task: Task | type[Task]) -> Callable[[bytes], AnyQuery]:
    """Return the function that parses a request to a task that does not generate."""
    if task.transcribes:
        return _parse_recording
    if task.modality != "text":
        return partial(_parse_file, task.modality)
    return _parse_tags if task.has_words else _parse_texts


def decoded(body: bytes, kind: type[Asked]) -> Asked:
    """Decode a body, or refuse invalid JSON (400) or another schema (422)."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(422, f"invalid request: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body can't be read as JSON: {error}") from None


def _no_writing(stream: bool | None) -> None:
    # Hugging Face's client sends `stream` with every generation request, and with no other.
    if stream is not None:
        raise Refused(422, "the model is no language model: it writes nothing, so there is no `stream`")


def _row(one: str | Pair) -> dict[str, Any]:
    if isinstance(one, str):
        return {"text": one}
    return {"text": one.text} if one.text_pair is None else {"text": one.text, "text_pair": one.text_pair}
