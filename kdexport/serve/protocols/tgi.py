"""Hugging Face's text generation, at once or as a stream of tokens.

Source: huggingface_hub's generated types and `InferenceClient.text_generation`, and text-generation-inference's
router. The response at `/` is a list of one. Unlike there, it excludes the stop sequence.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType, structs

from kdexport import __version__
from kdexport.runtime.generation import MAX_STOPS, Finish, Piece, Seed, Share, Stops, Temperature
from kdexport.serve.generating import Generator, Job, job_of
from kdexport.serve.http import Refused, encode, event
from kdexport.serve.protocols.huggingface import Count, decoded
from kdexport.serve.registry import Version

Whole = Annotated[float, Meta(ge=0, le=2**31, multiple_of=1)]
# Up to the largest integer that is exact in a float.
GivenSeed = Seed | Annotated[float, Meta(ge=0, le=2**53, multiple_of=1)]
_NEW_TOKENS = 100  # by default
Reason = Literal["length", "eos_token", "stop_sequence"]
_FINISH: dict[Finish, Reason] = {"length": "length", "end": "eos_token", "stop": "stop_sequence"}


class WriteParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling parameters: with `do_sample` or a `temperature`; else greedy."""

    max_new_tokens: Count | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: Whole | None = None
    top_p: Share | None = None
    seed: GivenSeed | None = None
    stop: Stops | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    # Unsupported: refused unless absent, null or the default, which has no effect.
    adapter_id: Any = None
    best_of: Any = 1
    decoder_input_details: Any = False
    frequency_penalty: Any = 0
    grammar: Any = None
    repetition_penalty: Any = 1
    top_n_tokens: Any = 0
    truncate: Any = None
    typical_p: Any = 1
    watermark: Any = False


class WriteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt, its parameters, and whether to stream tokens."""

    inputs: str
    parameters: WriteParameters | None = None
    stream: bool | None = None


class Token(msgspec.Struct):
    """A token, its text, and its log probability under the model."""

    id: int
    text: str
    logprob: float
    special: bool


class Details(msgspec.Struct):
    """The finish reason and all tokens."""

    finish_reason: Reason
    generated_tokens: int
    seed: int | None
    prefill: list[Token]
    tokens: list[Token]


class Generated(msgspec.Struct):
    """The generated text; with `return_full_text` after the prompt."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct):
    """The finish reason and token counts."""

    finish_reason: Reason
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
    """The first model, in text-generation-inference's terms."""

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

    def render(self, _: Version) -> bytes:
        """Return the whole response."""
        job = self.job
        found = Generated(self.before + job.completion)
        if self.details:
            tokens = list(map(_token, job.pieces))
            found.details = Details(_FINISH[job.finish], len(tokens), job.how.seed, [], tokens)
        return encode([found])

    def render_piece(self, _: Version, index: int, piece: Piece) -> bytes:
        """Return one token as an event."""
        job = self.job
        found = StreamToken(index, _token(piece))
        if piece.finish:
            found.generated_text = self.before + job.completion
            found.details = StreamDetails(_FINISH[piece.finish], len(job.pieces), job.prompt_tokens, job.how.seed)
        return event(found)


def unsupported(default: msgspec.Struct) -> dict[str, Any]:
    """Return the unsupported parameters of a request (their type is Any), with their no-op values."""
    return {field.name: getattr(default, field.name) for field in structs.fields(default) if field.type is Any}


def refuse_unsupported(asked: msgspec.Struct, neutral: dict[str, Any]) -> None:
    """Refuse unsupported parameters (422) that are not set to a no-op value."""
    for name, good in neutral.items():
        value = getattr(asked, name)
        if value is None or (value == good and isinstance(value, bool) == isinstance(good, bool)):
            continue
        may = "" if good is None else f" or {encode(good).decode()}"
        raise Refused(422, f"{name} is not supported; it may be absent{may}")


_DEFAULT = WriteParameters()
NEUTRAL = unsupported(_DEFAULT)


def parse(body: bytes, generator: Generator, max_chars: int) -> Query:
    """Parse a request."""
    asked = decoded(body, WriteRequest)
    how = asked.parameters or _DEFAULT
    refuse_unsupported(how, NEUTRAL)
    given = {
        "max_new_tokens": int(how.max_new_tokens or min(_NEW_TOKENS, generator.room)),
        "temperature": float(how.do_sample or False) if how.temperature is None else how.temperature,
        "top_k": int(how.top_k or 0), "top_p": how.top_p, "stop": how.stop,
        "seed": None if how.seed is None else int(how.seed),
    }  # fmt: skip
    before = asked.inputs if how.return_full_text else ""
    return Query(job_of(generator, asked.inputs, given, max_chars), bool(asked.stream), bool(how.details), before)


def info(version: Version, generator: Generator) -> WriterInfo:
    """`GET /info`."""
    most = generator.room + 1
    return WriterInfo(
        version.name, version.version, version.variant, "text-generation", MAX_STOPS, generator.room, most, __version__
    )


def _token(piece: Piece) -> Token:
    return Token(piece.id, piece.text, piece.log_p, piece.finish == "end")
