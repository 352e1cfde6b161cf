"""OpenAI's completions: `POST /v1/completions` and `GET /v1/models`, with vLLM's `top_k`.

Source: OpenAI's API reference. The default temperature is 1, as there; errors are this server's, `{"error": "…"}`.
"""

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
from kdexport.serve.protocols.tgi import GivenSeed, Whole, refuse_unsupported, unsupported
from kdexport.serve.registry import Version

_NEW_TOKENS = 16  # by default
_FINISH: dict[Finish, Literal["length", "stop"]] = {"length": "length", "end": "stop", "stop": "stop"}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream; `include_usage` adds an event with the token counts."""

    include_usage: bool | None = None


class CompletionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt and sampling parameters."""

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
    # Unsupported: refused unless absent, null or the default, which has no effect.
    best_of: Any = 1
    echo: Any = False
    frequency_penalty: Any = 0
    logit_bias: Any = {}
    logprobs: Any = None
    n: Any = 1
    presence_penalty: Any = 0
    suffix: Any = ""


class Choice(msgspec.Struct):
    """A completion, or one token of it."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Literal["length", "stop"] | None = None


class Usage(msgspec.Struct):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct):
    """A response, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType = UNSET


class ModelEntry(msgspec.Struct):
    """A language model, recogniser or model of vectors in service; `created` is its load time."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: Literal["kdexport"] = "kdexport"


class ModelList(msgspec.Struct):
    """The language models, speech recognisers and models of vectors in service."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


class Query(NamedTuple):
    """A parsed request; all events share `id` and `created`."""

    job: Job
    stream: bool
    usage: bool
    id: str
    created: int

    def render(self, version: Version) -> bytes:
        """Return the whole response."""
        choice = Choice(self.job.completion, finish_reason=_FINISH[self.job.finish])
        return encode(self._completion(version, [choice], self._usage()))

    def render_piece(self, version: Version, _: int, piece: Piece) -> bytes:
        """Return one token as an event, and after the last one the requested usage and `[DONE]`."""
        choice = Choice(piece.text, finish_reason=_FINISH[piece.finish] if piece.finish else None)
        found = event(self._completion(version, [choice]))
        if piece.finish and self.usage:
            found += event(self._completion(version, [], self._usage()))
        return found + event(b"[DONE]") if piece.finish else found

    def _completion(self, version: Version, choices: list[Choice], usage: Usage | UnsetType = UNSET) -> Completion:
        return Completion(self.id, "text_completion", self.created, version.name, choices, usage)

    def _usage(self) -> Usage:
        read, written = self.job.prompt_tokens, len(self.job.pieces)
        return Usage(read, written, read + written)


NEUTRAL = unsupported(CompletionRequest("", ""))


def decode(body: bytes) -> CompletionRequest:
    """Decode a body, without its model."""
    asked = decoded(body, CompletionRequest)
    refuse_unsupported(asked, NEUTRAL)
    return asked


def parse(asked: CompletionRequest, generator: Generator, max_chars: int) -> Query:
    """Parse a request for a model."""
    given = {
        "max_new_tokens": int(asked.max_tokens or min(_NEW_TOKENS, generator.room)),
        "temperature": 1.0 if asked.temperature is None else asked.temperature, "top_p": asked.top_p,
        "top_k": int(asked.top_k or 0), "seed": None if asked.seed is None else int(asked.seed),
        "stop": [asked.stop] if isinstance(asked.stop, str) else asked.stop,
    }  # fmt: skip
    job = job_of(generator, asked.prompt, given, max_chars)
    usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return Query(job, bool(asked.stream), usage, f"cmpl-{uuid4().hex}", int(time.time()))


def models(versions: Iterable[Version]) -> ModelList:
    """`GET /v1/models`."""
    asked = (v for v in versions if v.generator or v.task.transcribes or v.task.embeds)
    return ModelList([ModelEntry(v.name, v.loaded) for v in asked])
