"""OpenAI's transcriptions: `POST /v1/audio/transcriptions`, a form with a recording.

Source: OpenAI's API reference and the types of its Python client; forms are those of RFC 7578. A model recognises a
recording as a whole, so a stream has one delta. `language` must be the model's; it is returned as given where that is
not known.
"""

import math
import re
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace

from kdexport.serve.http import EVENTS, JSON, Headers, Refused, encode, event
from kdexport.serve.protocols.huggingface import TranscribeQuery
from kdexport.serve.protocols.tgi import refuse_unsupported
from kdexport.tasks.inputs.languages import code_of, shown
from kdexport.tasks.inputs.recordings import read_header
from kdexport.tasks.transcripts import Transcript, Word

_FORM = re.compile(rb'\s*multipart/form-data\s*;(?:.*;)?\s*boundary=("?)([^"\s;,]{1,70})\1\s*(?:;.*)?', re.IGNORECASE)
_NAME = re.compile(
    rb'^content-disposition: *form-data *;(?:[^\r\n]*?;)?? *name="?([^"\s;]*)', re.IGNORECASE | re.MULTILINE
)
_MOST_PARTS, _MOST_HEAD = 32, 2048  # of a form, and bytes of a part's headers
# A segment ends at a pause this long, and is at most this long, in seconds.
_PAUSE, _LONGEST = 0.5, 10.0
# Parameters without effect: refused unless they have these values.
NEUTRAL = {"prompt": "", "temperature": 0}
_TEXT = (b"content-type", b"text/plain; charset=utf-8")
_VTT = (b"content-type", b"text/vtt; charset=utf-8")
Granularity = Literal["word", "segment"]


class TranscriptionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of the form: a recording, and the format of the response."""

    file: bytes
    model: str
    language: Annotated[str, Meta(max_length=35)] = ""
    prompt: str = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = 0.0
    timestamp_granularities: list[Granularity] = field(default_factory=list, name="timestamp_granularities[]")
    stream: bool = False


class Duration(msgspec.Struct):
    """The length of the recording."""

    seconds: float
    type: Literal["duration"] = "duration"


class Transcription(msgspec.Struct):
    """The response in `json`."""

    text: str
    usage: Duration


class Segment(msgspec.Struct):
    """Words between two pauses, in OpenAI's fields; the whole text of a model that gives no times.

    The log probability is the recording's; fields that are not known are neutral, as clients require them.
    """

    id: int
    start: float
    end: float
    text: str
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float = 0.0
    seek: int = 0
    temperature: float = 0.0
    tokens: list[int] = []


class VerboseTranscription(msgspec.Struct):
    """The response in `verbose_json`; the language is the model's, else that of the request, or undetermined."""

    text: str
    language: str
    duration: float
    usage: Duration
    task: Literal["transcribe"] = "transcribe"
    segments: list[Segment] | UnsetType = UNSET
    words: list[Word] | UnsetType = UNSET


class TranscriptionEvent(msgspec.Struct):
    """An event of a stream."""

    type: Literal["transcript.text.delta", "transcript.text.done"]
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET


def decode(content_type: bytes, body: bytes) -> TranscriptionRequest:
    """Decode a form, without its model."""
    given: dict[str, Any] = {}
    for name, value in _fields(content_type, body):
        if name == "file":
            given[name] = value
        elif name.endswith("[]"):
            given.setdefault(name, []).append(_text(name, value))
        else:
            given[name] = _text(name, value)
    try:
        asked = msgspec.convert(given, TranscriptionRequest, strict=False)
    except msgspec.ValidationError as error:
        raise Refused(422, f"invalid request: {error}") from None
    refuse_unsupported(asked, NEUTRAL)
    if asked.timestamp_granularities and asked.response_format != "verbose_json":
        raise Refused(422, "timestamp_granularities[] is for the response_format verbose_json")
    if asked.stream and asked.response_format not in ("json", "text"):
        raise Refused(422, "a stream has events of text: response_format may be absent, json or text")
    return asked


def in_language(asked: TranscriptionRequest, model: str, language: str) -> TranscriptionRequest:
    """Return a request in a model's language, where that is known; refuse another."""
    if language and asked.language and code_of(asked.language) != language:
        raise Refused(400, f"{model} recognises {shown(language)} alone: language may be absent, or {language}")
    return replace(asked, language=language or asked.language)


def parse(asked: TranscriptionRequest, file: bytes) -> TranscribeQuery:
    """Return the query for a form's recording."""
    return TranscribeQuery([{"audio": file}], partial(_written, asked))


def headers(asked: TranscriptionRequest) -> Headers:
    """Return the headers of the response."""
    if asked.stream:
        return EVENTS
    return [{"text": _TEXT, "srt": _TEXT, "vtt": _VTT}.get(asked.response_format, JSON)]


def _fields(content_type: bytes, body: bytes) -> Iterator[tuple[str, bytes]]:
    """Split a form into names and values."""
    kind = _FORM.fullmatch(content_type)
    if not kind:
        raise Refused(415, "the body must be multipart/form-data, with its boundary in the content-type")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + kind[2], _MOST_PARTS + 2)
    if not parts or not parts.pop().startswith(b"--"):
        raise Refused(400, f"the form is cut off, or has more than {_MOST_PARTS} fields")
    for part in parts:
        head, _, _ = part[:_MOST_HEAD].partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if not name or len(head) + 4 > min(len(part), _MOST_HEAD) or b"content-transfer-encoding" in head.lower():
            raise Refused(400, "a part of the form is not `Content-Disposition: form-data; name=…` and a value")
        yield name[1].decode("latin-1"), part[len(head) + 4 :]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Refused(400, f"the field {name} is not UTF-8") from None


def _written(asked: TranscriptionRequest, found: Transcript) -> bytes:
    """Return the body of the response."""
    if asked.stream:
        done = event(TranscriptionEvent("transcript.text.done", text=found.text))
        return event(TranscriptionEvent("transcript.text.delta", delta=found.text)) + done
    usage = Duration(round(read_header(asked.file).seconds, 3))
    segments = list(_segments(found, usage.seconds))
    match asked.response_format:
        case "text":
            return f"{found.text}\n".encode()
        case "srt":
            return _subtitles(segments, ",", numbered=True).encode()
        case "vtt":
            return f"WEBVTT\n\n{_subtitles(segments, '.', numbered=False)}".encode()
    if asked.response_format == "json":
        return encode(Transcription(found.text, usage))
    verbose = VerboseTranscription(found.text, asked.language or "und", usage.seconds, usage)
    granularities = asked.timestamp_granularities or ["segment"]
    if "segment" in granularities:
        verbose.segments = segments
    if "word" in granularities:
        verbose.words = found.words
    return encode(verbose)


def _segments(found: Transcript, seconds: float) -> Iterator[Segment]:
    """Split a transcript at pauses."""
    groups: list[list[Word]] = []
    for word in found.words or ([Word(found.text, 0.0, seconds)] if found.text else []):
        if not groups or word.start - groups[-1][-1].end > _PAUSE or word.end - groups[-1][0].start > _LONGEST:
            groups.append([])
        groups[-1].append(word)
    for i, words in enumerate(groups):
        text = " ".join(word.word for word in words)
        plain = text.encode()
        ratio = len(plain) / len(zlib.compress(plain))
        yield Segment(i, words[0].start, words[-1].end, text, math.log(max(found.score, 1e-30)), ratio)


def _subtitles(segments: list[Segment], point: str, numbered: bool) -> str:
    cues = (f"{_time(one.start, point)} --> {_time(one.end, point)}\n{one.text}\n\n" for one in segments)
    return "".join(f"{i}\n{cue}" if numbered else cue for i, cue in enumerate(cues, 1))


def _time(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
