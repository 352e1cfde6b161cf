"""Vectors of texts: text-embeddings-inference's `/embed`, `/embed_all`, `/similarity`; OpenAI's `/v1/embeddings`.

Source: its router/src/http/types.rs, of which Hugging Face's client sends the first and the third; and OpenAI's API
reference. Token ids are taken as the model's tokenizer gives them, special ones included, as there: nothing is added.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from kdexport.errors import DataError
from kdexport.serve.http import Refused, encode
from kdexport.serve.protocols.huggingface import Count, decoded
from kdexport.serve.registry import Result, Version
from kdexport.serve.settings import Settings
from kdexport.tasks.base import can_embed
from kdexport.tasks.metrics import Array
from kdexport.tasks.vectors import EmbeddingDtype, check_dimensions, encoded, unit

# A text, its token ids, or a list of either.
# 2.0 is an integer, too: see `Count`.
Token = Annotated[float, msgspec.Meta(multiple_of=1)]
Input = str | list[str | Token | list[Token]]


class Sentences(msgspec.Struct, frozen=True):
    """A sentence, and others to compare it with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(msgspec.Struct, frozen=True):
    """Truncation of the sentences, and the name of the prompt before each."""

    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: str | None = None


class SimilarityRequest(msgspec.Struct, frozen=True):
    """The cosines of a sentence with others."""

    inputs: Sentences
    parameters: SimilarityParameters | None = None


class EmbedAllRequest(msgspec.Struct, frozen=True):
    """A vector for each token of a text, or of each text of a list; `prompt_name` is one of the model's prompts."""

    inputs: Input
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: str | None = None


class EmbedRequest(EmbedAllRequest, frozen=True):
    """A vector for a text, or for each of a list, of its first `dimensions`."""

    normalize: bool | None = True
    dimensions: Count | None = None
    encoding_format: Literal["float"] | None = None


class FeatureRequest(EmbedRequest, frozen=True):
    """Either of both, as Hugging Face's client sends it."""

    inputs: Input | Sentences  # type: ignore[assignment]
    parameters: SimilarityParameters | None = None


class EmbeddingsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts or token ids; smaller numbers, `embedding_dtype`, come as lists alone."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None
    prompt_name: str | None = None
    embedding_dtype: EmbeddingDtype = "float"


class Embedding(msgspec.Struct):
    """A vector, as numbers or as base64 of little-endian float32."""

    embedding: list[float] | str
    index: int
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """The vectors, in the order of the texts."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Query(NamedTuple):
    """A parsed request; `write` returns the body of the response."""

    rows: list[dict[str, Any]]
    write: Callable[[Version, Sequence[Result]], bytes]
    each: Literal["vector", "vectors of tokens", "number"] = "vector"  # for each row
    uncut: bool = False
    advice: str = "give fewer texts"

    def entries(self, version: Version) -> int:
        """Return the most numbers of the response."""
        match self.each:
            case "vector":
                return len(self.rows) * int(version.task.answer_shape[0])
            case "number":
                return len(self.rows)
        return int(sum(map(version.cost, self.rows)) * version.token_width)

    def render(self, version: Version, results: Sequence[Result]) -> bytes:
        """Return the vectors, or cosines, of all rows."""
        return self.write(version, results)


def parse(version: Version, settings: Settings, body: bytes) -> Query:
    """Parse a request for vectors or for similarities."""
    asked = decoded(body, FeatureRequest)
    if isinstance(asked.inputs, Sentences):
        return _similar(version, settings, asked.inputs, asked.parameters)
    return _embed(version, settings, asked, asked.inputs)


def embed(version: Version, settings: Settings, body: bytes) -> Query:
    """Parse a request for vectors."""
    asked = decoded(body, EmbedRequest)
    return _embed(version, settings, asked, asked.inputs)


def embed_all(version: Version, settings: Settings, body: bytes) -> Query:
    """Parse a request for a vector of each token."""
    asked = decoded(body, EmbedAllRequest)
    rows = _rows(version, settings, asked.inputs, asked.prompt_name)
    return Query(rows, _of_tokens, "vectors of tokens", asked.truncate is False)


def similarity(version: Version, settings: Settings, body: bytes) -> Query:
    """Parse a request for similarities."""
    asked = decoded(body, SimilarityRequest)
    return _similar(version, settings, asked.inputs, asked.parameters)


def decode(body: bytes) -> EmbeddingsRequest:
    """Decode a body of OpenAI's API, without its model."""
    asked = decoded(body, EmbeddingsRequest)
    if asked.embedding_dtype != "float" and asked.encoding_format == "base64":
        # OpenAI's client asks for base64 where its caller names nothing, and reads float32 out of it.
        raise Refused(422, f"{asked.embedding_dtype} vectors come as numbers: ask for encoding_format float")
    return asked


def openai(asked: EmbeddingsRequest, version: Version, settings: Settings, _: bytes) -> Query:
    """Parse a request of OpenAI's API for a model."""
    rows = _rows(version, settings, asked.input, asked.prompt_name)
    return Query(rows, partial(_listed, asked, _dimensions(version, asked.dimensions)))


def _embed(version: Version, settings: Settings, asked: EmbedRequest, inputs: Input) -> Query:
    rows, dimensions = _rows(version, settings, inputs, asked.prompt_name), _dimensions(version, asked.dimensions)
    return Query(rows, partial(_nested, dimensions, asked.normalize is not False), uncut=asked.truncate is False)


def _similar(version: Version, settings: Settings, given: Sentences, how: SimilarityParameters | None) -> Query:
    how = how or SimilarityParameters()
    if not given.sentences:
        raise Refused(422, "there is no sentence to compare with")
    rows = _rows(version, settings, [given.source_sentence, *given.sentences], how.prompt_name)
    return Query(rows, _cosines, "number", how.truncate is False)


def _rows(version: Version, settings: Settings, given: Input, prompt: str | None) -> list[dict[str, Any]]:
    task = version.task
    if not can_embed(task):
        raise Refused(404, f"{version.name} is for {task.name}, and makes no vectors")
    alone = isinstance(given, str) or (given and all(isinstance(one, float) for one in given))
    many: list[Any] = [given] if alone else given  # type: ignore[assignment]
    if not 1 <= len(many) <= settings.max_rows:
        raise Refused(422, f"a request may have 1 to {settings.max_rows} texts; it has {len(many)}")
    if any(isinstance(one, float) for one in many):
        raise Refused(422, "the token ids of several texts are a list of lists")
    if not all(many):
        raise Refused(422, "a text is empty")
    try:
        task.check_prompt(prompt)
        if prompt is not None and not all(isinstance(one, str) for one in many):
            raise DataError("token ids have no prompt", "Put its tokens before them, and leave prompt_name out")
        named = {} if prompt is None else {"prompt": prompt}
        return [{"text": one} | named if isinstance(one, str) else task.of_ids(one) for one in many]
    except DataError as error:
        raise Refused(422, str(error)) from None


def _dimensions(version: Version, asked: float | None) -> int | None:
    try:
        check_dimensions(version.task.answer_shape[0], found := None if asked is None else int(asked))
    except DataError as error:
        raise Refused(422, str(error)) from None
    return found


def _vectors(results: Sequence[Result], dimensions: int | None, normalize: bool = True) -> Array:
    found = np.stack([result.logits[:dimensions] for result in results])
    return unit(found) if normalize else found


def _nested(dimensions: int | None, normalize: bool, version: Version, results: Sequence[Result]) -> bytes:
    return encode(_numbers(_vectors(results, dimensions, normalize)))


def _of_tokens(version: Version, results: Sequence[Result]) -> bytes:
    return encode([_numbers(result.logits) for result in results])


def _cosines(version: Version, results: Sequence[Result]) -> bytes:
    first, *others = _vectors(results, None)
    return encode(_numbers(np.stack(others) @ first))


def _listed(asked: EmbeddingsRequest, dimensions: int | None, version: Version, results: Sequence[Result]) -> bytes:
    vectors = encoded(_vectors(results, dimensions), asked.embedding_dtype)
    found: list[Any]
    if asked.encoding_format == "base64":
        found = [b64encode(vector).decode() for vector in vectors.astype("<f4")]
    else:
        found = _numbers(vectors) if asked.embedding_dtype == "float" else vectors.tolist()
    tokens = sum(result.size for result in results)
    data = [Embedding(vector, i) for i, vector in enumerate(found)]
    return encode(Embeddings(data, version.name, EmbeddingUsage(tokens, tokens)))


def _numbers(vectors: Array) -> Any:
    """Return float32 numbers at nine digits, which tell each from all others; float64 has seventeen."""
    exact = vectors.astype(np.float64)
    scale = 10.0 ** (8 - np.floor(np.log10(np.maximum(np.abs(exact), 1e-30))))
    return (np.rint(exact * scale) / scale).tolist()
