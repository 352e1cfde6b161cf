"""OpenAI's completions: `POST /v1/completions` and `GET /v1/models`, as OpenAI's own clients and vLLM's users ask.

Source: OpenAI's API reference. Without a temperature it is 1, as there; errors are this server's, `{"error": "…"}`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import msgspec
from msgspec import UNSET, UnsetType

from kdexport.runtime.generation import Finish, Piece, Share, Stop, Stops, Temperature
from kdexport.serve.generating import Generator, Job, job_of
from kdexport.serve.http import encode, event
from kdexport.serve.protocols.huggingface import Count, decoded
from kdexport.serve.protocols.tgi import GivenSeed, Whole, refuse_unsupported
from kdexport.serve.registry import Version

_NEW_TOKENS = 16  # new tokens, where a request does not say
_FINISH: dict[Finish, Literal["length", "stop"]] = {"length": "length", "end": "stop", "stop": "stop"}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a last event counts the tokens."""

    include_usage: bool | None = None


class CompletionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt, and how to go on. `top_k` is vLLM's."""

    model: str
    prompt: str
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Whole | None = None
    seed: GivenSeed | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Unsupported: refused unless absent or set to a value without effect.
    best_of: Any = None
    echo: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    n: Any = None
    presence_penalty: Any = None
    suffix: Any = None


# Parameter → what it may be beside absent.
NEUTRAL: dict[str, Any] = {
    "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}, "logprobs": None, "n": 1,
    "presence_penalty": 0, "suffix": "",
}  # fmt: skip


class Choice(msgspec.Struct):
    """What the model wrote, or one token of it."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Literal["length", "stop"] | None = None


class Usage(msgspec.Struct):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct):
    """An answer, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType = UNSET


class ModelEntry(msgspec.Struct):
    """A language model that is in service; `created` is when it was loaded."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: Literal["kdexport"] = "kdexport"


class ModelList(msgspec.Struct):
    """The language models."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


class Query(NamedTuple):
    """A parsed request; `id` and `created` are those of all its events."""

    job: Job
    stream: bool
    usage: bool
    id: str
    created: int


_decode = msgspec.json.Decoder(CompletionRequest).decode


def decode(body: bytes) -> CompletionRequest:
    """Decode the body, whose model is still to be found."""
    asked: CompletionRequest = decoded(_decode, body)
    refuse_unsupported(asked, NEUTRAL)
    return asked


def parse(asked: CompletionRequest, generator: Generator, max_chars: int) -> Query:
    """Parse a request to a model."""
    given = {
        "max_new_tokens": int(asked.max_tokens or min(_NEW_TOKENS, generator.room)),
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": asked.top_p,
        "top_k": int(asked.top_k or 0),
        "seed": None if asked.seed is None else int(asked.seed),
        "stop": [asked.stop] if isinstance(asked.stop, str) else asked.stop,
    }
    job = job_of(generator, asked.prompt, given, max_chars)
    usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return Query(job, bool(asked.stream), usage, f"cmpl-{uuid4().hex}", int(time.time()))


def render(version: Version, query: Query) -> bytes:
    """Return the whole answer."""
    choice = Choice(query.job.completion, finish_reason=_FINISH[query.job.finish])
    return encode(_completion(version, query, [choice], _usage(query.job)))


def render_piece(version: Version, query: Query, _: int, piece: Piece) -> bytes:
    """Return one token as an event; behind the last one the usage, where it is wanted, and the end."""
    choice = Choice(piece.text, finish_reason=_FINISH[piece.finish] if piece.finish else None)
    found = event(_completion(version, query, [choice]))
    if piece.finish and query.usage:
        found += event(_completion(version, query, [], _usage(query.job)))
    return found + event(b"[DONE]") if piece.finish else found


def models(versions: Iterable[Version]) -> ModelList:
    """`GET /v1/models`."""
    return ModelList([ModelEntry(version.name, version.generator.loaded) for version in versions if version.generator])


def _completion(version: Version, query: Query, choices: list[Choice], usage: Usage | UnsetType = UNSET) -> Completion:
    return Completion(query.id, "text_completion", query.created, version.name, choices, usage)


def _usage(done: Job) -> Usage:
    written = len(done.pieces)
    return Usage(done.prompt_tokens, written, done.prompt_tokens + written)
