"""The server's OpenAPI document, from `openapi.yaml` and the types of requests and responses."""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from kdexport.files import as_json
from kdexport.serve.openapi import PATH as PATH
from kdexport.serve.protocols import embeddings, huggingface, oip, openai, tei, tgi, transcriptions

_TYPES = [
    huggingface.ClassifyRequest, huggingface.TagRequest, tei.PredictRequest, oip.InferRequest, tgi.WriteRequest,
    tgi.Generated, tgi.StreamToken, tgi.WriterInfo, openai.CompletionRequest, openai.Completion, openai.ModelList,
    huggingface.TranscribeRequest, huggingface.Transcribed, transcriptions.TranscriptionRequest,
    transcriptions.Transcription, transcriptions.VerboseTranscription, transcriptions.TranscriptionEvent,
    tei.TranscriberInfo, embeddings.EmbedRequest, embeddings.EmbedAllRequest, embeddings.SimilarityRequest,
    embeddings.FeatureRequest, embeddings.EmbeddingsRequest, embeddings.Embeddings,
]  # fmt: skip


def generate() -> bytes:
    """Return the document as indented JSON, to be filled by the server."""
    found = yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8"))
    del found["x-parts"]
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    for name, neutral in (("WriteParameters", tgi.NEUTRAL), ("CompletionRequest", openai.NEUTRAL)):
        for parameter, value in neutral.items():
            values = [None] if value is None else [value, None]
            schemas[name]["properties"][parameter] = {"enum": values, "default": None}
    found["components"]["schemas"] = _merged(schemas, found["components"]["schemas"])
    return as_json(found)


def _merged(schemas: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Add schemas, and replace single properties of existing ones."""
    found = schemas | {name: schema for name, schema in more.items() if name not in schemas}
    for name in schemas.keys() & more.keys():
        found[name]["properties"] |= more[name]["properties"]
    return found
