"""text-embeddings-inference's `/predict`: texts → flat lists of labels with scores.

Source: its router/src/http/types.rs. A list of two texts is one pair; batches are lists of lists.
"""

from typing import Annotated, Any, Literal

import msgspec

from kdexport import __version__
from kdexport.serve.http import Refused
from kdexport.serve.protocols.huggingface import Query, decoded
from kdexport.serve.registry import Version
from kdexport.serve.settings import Settings
from kdexport.tasks.base import can_transcribe

Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=2)]


class PredictRequest(msgspec.Struct, frozen=True):
    """A text, a pair as a list of two, or a batch of such lists."""

    inputs: str | list[str | Texts]
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    raw_scores: bool = False


class TranscriberInfo(msgspec.Struct, frozen=True):
    """The first model, where it recognises speech: the longest recording it reads, and its rate in Hz."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_pipeline_tag: str
    max_input_seconds: float
    sampling_rate: int
    max_client_batch_size: int
    version: str


def parse(body: bytes) -> Query:
    """Parse a request."""
    asked = decoded(body, PredictRequest)
    kinds = {str} if isinstance(asked.inputs, str) else set(map(type, asked.inputs))
    if len(kinds) > 1:  # is a lone text beside a pair half a pair, or a row?
        raise Refused(422, "a batch is a list of lists, each of one text or two")
    single = kinds <= {str}
    batch: Any = [asked.inputs] if single else asked.inputs
    return Query(
        [_row(one) for one in batch],
        function="none" if asked.raw_scores else None,
        single=single,
        uncut=asked.truncate is False,
        advice="give fewer texts",
    )


def info(version: Version, settings: Settings) -> dict[str, Any] | TranscriberInfo:
    """`GET /info`."""
    task, audio, labels = version.task, version.task.config.audio, version.task.labels
    if can_transcribe(task) and audio:  # its labels are characters, and no answer has them
        named = (version.name, version.version, version.variant, version.task.name)
        return TranscriberInfo(*named, round(task.longest, 3), audio.rate, 1, __version__)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    vectors = task.config.embedding
    kind = (
        {"embedding": {"dimensions": vectors.width, "prompts": [*vectors.prompts]}}
        if vectors
        else {"classifier": names}
    )
    return {
        "model_id": version.name, "model_sha": version.version, "model_dtype": version.variant,
        "model_type": kind, "max_input_length": version.task.config.max_length,
        "max_batch_tokens": settings.max_batch_tokens, "max_batch_requests": settings.max_batch,
        "max_client_batch_size": settings.max_rows, "auto_truncate": True, "version": __version__,
    }  # fmt: skip


def _row(one: str | list[str]) -> dict[str, Any]:
    texts = [one] if isinstance(one, str) else one
    if not 1 <= len(texts) <= 2:
        raise Refused(422, "a list of texts is one text or a pair; a batch is a list of such lists")
    return dict(zip(("text", "text_pair"), texts, strict=False))
