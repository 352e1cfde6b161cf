"""The OpenAPI document: its schemas come from the very types that requests are decoded with.

`tests/test_serve_openapi.py` asks the server everything that the document allows, and much that it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec

from kdexport import __version__
from kdexport.serve import huggingface, oip, tei
from kdexport.serve.settings import Settings

Schema = dict[str, Any]

# Status → what it means. Every operation may end in one of the first, those that read a body in one of the second.
_ANY = {
    "408": "The request came too slowly.",
    "431": "The request's head is too large.",
    "500": "The server failed; its log says why.",
    "503": "Loading, draining, out of service, or too many connections.",
}
_OF_BODIES = {
    "400": "The body can't be read, or is not what the protocol says.",
    "413": "The body or a text is too large.",
    "415": "The content-encoding is none of gzip, deflate, identity.",
    "429": "Too much work is waiting.",
    "504": "The answer took longer than the request's deadline.",
}
_UNFIT = {"422": "The JSON is not what the API says."}
_NOT_FOUND = {"404": "There is no such model or version."}
_NO_KEY = {"401": "An API key is needed, and came not or wrong."}

_RETRY = {"Retry-After": {"description": "Seconds to come again after.", "schema": {"type": "integer", "minimum": 1}}}
_HEADERS = {
    "429": _RETRY,
    "503": _RETRY,
    "401": {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}},
}
_LENGTH = "Inference-Header-Content-Length"


class Class(msgspec.Struct):
    """A label and its score."""

    label: str
    score: float


class Error(msgspec.Struct):
    """What every error is."""

    error: str


class Live(msgspec.Struct):
    """Whether the process is worth keeping."""

    live: bool


class Ready(msgspec.Struct):
    """Whether requests are answered, and will be."""

    live: bool
    ready: bool


class ModelReady(msgspec.Struct):
    """Whether a model answers."""

    name: str
    ready: bool


class ServerMetadata(msgspec.Struct):
    """What serves."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct):
    """A tensor that a model takes or gives; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class OutputTensor(msgspec.Struct):
    """One output; its elements are in `data`, or follow the JSON as `parameters.binary_data_size` bytes."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET


class InferAnswer(msgspec.Struct):
    """Every output that was wanted; the request's id, if it had one."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | msgspec.UnsetType = msgspec.UNSET


class Classifier(msgspec.Struct):
    """The labels, as in a model's config.json."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(msgspec.Struct):
    """The kind of model."""

    classifier: Classifier


class Info(msgspec.Struct):
    """The first model, in text-embeddings-inference's words."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: ModelType
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str


_EXAMPLES: dict[type, list[Any]] = {
    huggingface.ClassifyRequest: [
        {"inputs": "how much is in my account?", "parameters": {"top_k": 1}},
        {"inputs": ["how much is in my account?", "play some music"]},
    ],
    tei.PredictRequest: [{"inputs": "play some music"}, {"inputs": [["play some music"], ["a text", "its pair"]]}],
    oip.InferRequest: [
        {
            "id": "42",
            "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["play some music"]}],
            "outputs": [{"name": "label"}, {"name": "logits", "parameters": {"classification": 2}}],
        }
    ],
}
_TYPES = [
    huggingface.ClassifyRequest, tei.PredictRequest, oip.InferRequest, Class, Error, Live, Ready, ModelReady,
    ServerMetadata, ModelMetadata, InferAnswer, Info,
]  # fmt: skip


@lru_cache(maxsize=1)  # to make it takes as long as an inference, and anyone may ask for it
def document(models: tuple[str, ...], versions: tuple[str, ...], settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1 of the public port.

    Args:
        models: the names that may stand in paths.
        versions: some that may, too; they change when a model is loaded anew.
        settings: the limits, and whether requests need a key.
    """
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    _tighten(schemas, settings)
    keys = {"bearer": {"type": "http", "scheme": "bearer"}} | {
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "kdexport", "version": __version__, "description": "Distilled ONNX models behind HTTP."},
        "paths": _paths(models, versions, bool(settings.api_keys)),
        "components": {
            "schemas": schemas,
            "responses": {
                status: _response(text, _named(Error), _HEADERS.get(status))
                for status, text in (_ANY | _OF_BODIES | _UNFIT | _NOT_FOUND | _NO_KEY).items()
            },
        },
    }
    if settings.api_keys:
        found["components"]["securitySchemes"] = keys
    return found


def _paths(models: Sequence[str], versions: Sequence[str], keyed: bool) -> dict[str, Any]:
    label = _named(Class)
    nested = {"type": "array", "items": {"type": "array", "items": label}}
    either = {"anyOf": [{"type": "array", "items": label}, nested]}
    name = _parameter("name", "path", {"type": "string", "enum": models})
    version = _parameter("version", "path", {"type": "string", "pattern": "^[0-9a-f]{12}$", "examples": versions})

    def get(id: str, summary: str, answer: type, parameters: list[Schema] | None = None, open: bool = True) -> Schema:
        found = _operation(id, summary, {"application/json": {"schema": _named(answer)}}, parameters or [])
        if answer in (Ready, ModelReady):  # "not yet" has the answer's own shape
            found["responses"]["503"] = _response(
                _ANY["503"], {"anyOf": [_named(answer), _named(Error)]}, _HEADERS["503"]
            )
        return {"get": found if open or not keyed else _locked(found)}

    def post(id: str, summary: str, asked: type, answer: Schema, parameters: list[Schema] | None = None) -> Schema:
        found = _operation(id, summary, {"application/json": {"schema": answer}}, parameters or [], _OF_BODIES)
        examples = {str(i): {"value": value} for i, value in enumerate(_EXAMPLES[asked], 1)}
        content = {"application/json": {"schema": _named(asked), "examples": examples}}
        found["requestBody"] = {"required": True, "content": content}
        if asked is not oip.InferRequest:
            found["responses"] |= _references(_UNFIT)
        return {"post": _locked(found) if keyed else found}

    html = {"text/html": {"schema": {"type": "string"}}}
    paths = {
        "/": {"get": _operation("page", "A page for people", html, [])}
        | post("classify", "Hugging Face's API, of the first model", huggingface.ClassifyRequest, nested),
        "/models/{name}": post("classifyBy", "Hugging Face's API", huggingface.ClassifyRequest, nested, [name]),
        "/predict": post("predict", "text-embeddings-inference's API", tei.PredictRequest, either),
        "/invocations": post("invocations", "The same, at SageMaker's path", tei.PredictRequest, either),
        "/info": get("info", "The first model, in text-embeddings-inference's words", Info, open=False),
        "/ping": get("ping", "Ready? SageMaker's path", Ready),
        "/health": get("health", "Ready? text-embeddings-inference's path", Ready),
        "/openapi.json": {
            "get": _operation("openapi", "This document", {"application/json": {"schema": {"type": "object"}}}, [])
        },
        "/v2": get("server", "The server and its extensions", ServerMetadata),
        "/v2/": get("serverToo", "The same, as the protocol's OpenAPI document writes it", ServerMetadata),
        "/v2/health/live": get("live", "Live?", Live),
        "/v2/health/ready": get("ready", "Ready?", Ready),
    }
    for path, parameters, of in (
        ("/v2/models/{name}", [name], ""),
        ("/v2/models/{name}/versions/{version}", [name, version], "OfVersion"),
    ):
        paths[path] = get(f"model{of}", "A model's inputs and outputs", ModelMetadata, parameters, open=False)
        paths[f"{path}/ready"] = get(f"modelReady{of}", "Ready?", ModelReady, parameters, open=False)
        infer = post(f"infer{of}", "Open Inference Protocol", oip.InferRequest, _named(InferAnswer), parameters)
        paths[f"{path}/infer"] = _with_raw_tensors(infer)
    return paths


def _with_raw_tensors(infer: Schema) -> Schema:
    """The binary extension: JSON, and raw tensors behind it."""
    raw = {"schema": {"type": "string", "format": "binary", "description": "JSON, then the raw tensors in order."}}
    length = {"type": "integer", "minimum": 1, "maximum": 10**12 - 1}
    about = "How many of the body's bytes are JSON, when raw tensors follow it."
    post = infer["post"]
    post["parameters"].append(_parameter(_LENGTH, "header", length, about))
    post["requestBody"]["content"]["application/octet-stream"] = raw
    post["responses"]["200"]["content"]["application/octet-stream"] = raw
    post["responses"]["200"]["headers"] = {_LENGTH: {"description": about, "schema": length}}
    return infer


def _tighten(schemas: dict[str, Schema], settings: Settings) -> None:
    """What the types don't know: limits that are settings, and what is checked once the JSON is read."""
    text: Schema = {"type": "string", "maxLength": settings.max_chars}
    rows = {"minItems": 1, "maxItems": settings.max_rows}
    pair = schemas["Pair"]["properties"]
    pair["text"] = text
    pair["text_pair"] = {"anyOf": [text, {"type": "null"}], "default": None}
    one = {"anyOf": [text, {"$ref": "#/components/schemas/Pair"}]}
    schemas["ClassifyRequest"]["properties"]["inputs"] = {
        "anyOf": [*one["anyOf"], {"type": "array", "items": one, **rows}]
    }
    single = {"type": "array", "items": text, "minItems": 1, "maxItems": 2}
    schemas["PredictRequest"]["properties"]["inputs"] = {
        "anyOf": [text, single, {"type": "array", "items": single, **rows}]
    }
    elements: list[Schema] = [{"$ref": "#/components/schemas/TensorData"}]
    elements += [{"type": kind} for kind in ("number", "string", "boolean")]
    schemas["TensorData"] = {
        "title": "TensorData",
        "description": "Elements in row-major order, nested as the shape says, or flat.",
        "type": "array",
        "items": {"anyOf": elements},
    }
    for tensor in ("InputTensor", "OutputTensor"):
        schemas[tensor]["properties"]["data"] = {"$ref": "#/components/schemas/TensorData"}
    whole = {"type": "integer", "minimum": 1, "maximum": 2**31}
    schemas["Parameters"]["properties"]["top_k"] = {"anyOf": [whole, {"type": "null"}], "default": None}
    schemas["RequestedOutput"]["properties"]["name"] = {"enum": list(oip.OUTPUTS)}


def _operation(
    id: str, summary: str, content: Schema, parameters: list[Schema], errors: dict[str, str] | None = None
) -> Schema:
    known = _ANY | (errors or {}) | (_NOT_FOUND if any(one["in"] == "path" for one in parameters) else {})
    return {
        "operationId": id,
        "summary": summary,
        "parameters": parameters.copy(),
        "responses": {"200": {"description": "The answer.", "content": content}} | _references(known),
    }


def _locked(operation: Schema) -> Schema:
    operation["security"] = [{"bearer": []}, {"header": []}]
    operation["responses"] |= _references(_NO_KEY)
    return operation


def _references(statuses: dict[str, str]) -> Schema:
    return {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _response(text: str, schema: Schema, headers: Schema | None) -> Schema:
    found: Schema = {"description": text, "content": {"application/json": {"schema": schema}}}
    return found | ({"headers": headers} if headers else {})


def _parameter(name: str, where: Literal["path", "header"], schema: Schema, about: str = "") -> Schema:
    found = {"name": name, "in": where, "required": where == "path", "schema": schema}
    return found | ({"description": about} if about else {})


def _named(answer: type) -> Schema:
    return {"$ref": f"#/components/schemas/{answer.__name__}"}
