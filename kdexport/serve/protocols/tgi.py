"""Hugging Face's text generation: a prompt in, what the model writes after it out, at once or a token at a time.

Source: huggingface_hub's generated types and `InferenceClient.text_generation`, and text-generation-inference's
router. Its answer at `/` is a list of one. Unlike there, a text that stops is not part of the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kdexport import __version__
from kdexport.runtime.generation import MAX_STOPS, Finish, Piece, Seed, Share, Stops, Temperature
from kdexport.serve.generating import Generator, Job, job_of
from kdexport.serve.http import Refused, encode, event
from kdexport.serve.protocols.huggingface import Count, decoded
from kdexport.serve.registry import Version

Whole = Annotated[float, Meta(ge=0, le=2**31, multiple_of=1)]
# Without a limit of its own; every number that others than Python write exactly.
GivenSeed = Seed | Annotated[float, Meta(ge=0, le=2**53, multiple_of=1)]
_NEW_TOKENS = 100  # new tokens, where a request does not say
_FINISH: dict[Finish, Literal["length", "eos_token", "stop_sequence"]] = {
    "length": "length", "end": "eos_token", "stop": "stop_sequence"
}  # fmt: skip


class WriteParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to go on. Tokens are drawn with `do_sample` or a `temperature`; else each is the most probable one."""

    max_new_tokens: Count | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: Whole | None = None
    top_p: Share | None = None
    seed: GivenSeed | None = None
    stop: Stops | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    # Unsupported: refused unless absent or set to a value without effect.
    adapter_id: Any = None
    best_of: Any = None
    decoder_input_details: Any = None
    frequency_penalty: Any = None
    grammar: Any = None
    repetition_penalty: Any = None
    top_n_tokens: Any = None
    truncate: Any = None
    typical_p: Any = None
    watermark: Any = None


class WriteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt, how to continue it, and whether tokens come one by one."""

    inputs: str
    parameters: WriteParameters | None = None
    stream: bool | None = None


# Parameter → what it may be beside absent.
NEUTRAL: dict[str, Any] = {
    "adapter_id": None, "best_of": 1, "decoder_input_details": False, "frequency_penalty": 0, "grammar": None,
    "repetition_penalty": 1, "top_n_tokens": 0, "truncate": None, "typical_p": 1, "watermark": False,
}  # fmt: skip


class Token(msgspec.Struct):
    """A token, what it adds to the text, and its log probability under the model."""

    id: int
    text: str
    logprob: float
    special: bool


class Details(msgspec.Struct):
    """Why it ended, and every token."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[Token]
    tokens: list[Token]


class Generated(msgspec.Struct):
    """What the model wrote; after the prompt, with `return_full_text`."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct):
    """Why it ended, and how many tokens there were."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    input_length: int
    seed: int | None


class StreamToken(msgspec.Struct):
    """One event of a stream; the last one has the whole text."""

    index: int
    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class WriterInfo(msgspec.Struct):
    """The first model, in text-generation-inference's words."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_pipeline_tag: Literal["text-generation"]
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    version: str


class Query(NamedTuple):
    """A parsed request."""

    job: Job
    stream: bool
    details: bool
    before: str


_decode = msgspec.json.Decoder(WriteRequest).decode
_DEFAULT = WriteParameters()


def parse(body: bytes, generator: Generator, max_chars: int) -> Query:
    """Parse a request."""
    asked = decoded(_decode, body)
    how = asked.parameters or _DEFAULT
    refuse_unsupported(how, NEUTRAL)
    given = {
        "max_new_tokens": int(how.max_new_tokens or min(_NEW_TOKENS, generator.room)),
        "temperature": float(how.do_sample or False) if how.temperature is None else how.temperature,
        "top_k": int(how.top_k or 0),
        "top_p": how.top_p,
        "seed": None if how.seed is None else int(how.seed),
        "stop": how.stop,
    }
    before = asked.inputs if how.return_full_text else ""
    return Query(job_of(generator, asked.inputs, given, max_chars), bool(asked.stream), bool(how.details), before)


def render(_: Version, query: Query) -> bytes:
    """Return the whole answer."""
    job = query.job
    found = Generated(query.before + job.completion)
    if query.details:
        tokens = list(map(_token, job.pieces))
        found.details = Details(_FINISH[job.finish], len(tokens), job.how.seed, [], tokens)
    return encode([found])


def render_piece(_: Version, query: Query, index: int, piece: Piece) -> bytes:
    """Return one token as an event."""
    found = StreamToken(index, _token(piece))
    if piece.finish:
        found.generated_text = query.before + query.job.completion
        job = query.job
        found.details = StreamDetails(_FINISH[piece.finish], len(job.pieces), job.prompt_tokens, job.how.seed)
    return event(found)


def info(version: Version, generator: Generator) -> WriterInfo:
    """`GET /info`."""
    most = generator.room + 1
    return WriterInfo(
        version.name, version.version, version.variant, "text-generation", MAX_STOPS, generator.room, most, __version__
    )


def refuse_unsupported(asked: Any, neutral: dict[str, Any]) -> None:
    """Refuse what would change the answer and is not done here (422)."""
    for name, good in neutral.items():
        value = getattr(asked, name)
        if value is None or (value == good and isinstance(value, bool) == isinstance(good, bool)):
            continue
        may = "" if good is None else f" or {encode(good).decode()}"
        raise Refused(422, f"{name} is not supported; it may be absent{may}")


def _token(piece: Piece) -> Token:
    return Token(piece.id, piece.text, piece.log_p, piece.finish == "end")
