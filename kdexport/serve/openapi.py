"""The OpenAPI document: written from the very types that requests are decoded with."""

from __future__ import annotations

from typing import Any

import msgspec

from kdexport import __version__
from kdexport.serve import huggingface, oip, tei

_ANY: dict[str, Any] = {}
_BAD = {
    "400": "not what the protocol says",
    "404": "no such model, version or path",
    "408": "the request came too slowly",
    "413": "the body or a text is too large",
    "415": "an unknown content-encoding",
    "422": "not what the protocol says",
    "429": "too much work is waiting; Retry-After says when to come again",
    "500": "the model or the server failed",
    "503": "loading, draining, or out of service",
    "504": "the deadline passed",
}


class Class(msgspec.Struct):
    """A label and its score."""

    label: str
    score: float


class ErrorAnswer(msgspec.Struct):
    """What every error is."""

    error: str


def document(models: list[str], keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of the public port.

    Args:
        models: the names that may stand in paths.
        keyed: whether requests need an API key.
    """
    schemas, components = msgspec.json.schema_components(
        [huggingface.ClassifyRequest, tei.PredictRequest, oip.InferRequest, Class, ErrorAnswer],
        ref_template="#/components/schemas/{name}",
    )
    classify, predict, infer, one, error = schemas
    _amend(components)
    flat = {"type": "array", "items": one}
    nested = {"type": "array", "items": flat}
    name = _parameter("name", {"type": "string", "enum": models})
    version = _parameter("version", {"type": "string"})
    health = _object(live={"type": "boolean"}, ready={"type": "boolean"})
    model_ready = _object(name={"type": "string"}, ready={"type": "boolean"})
    metadata = _object(
        name={"type": "string"}, versions={"type": "array", "items": {"type": "string"}}, platform={"type": "string"},
        inputs={"type": "array"}, outputs={"type": "array"},
    )  # fmt: skip
    inferred = _object(model_name={"type": "string"}, outputs={"type": "array", "items": {"type": "object"}})
    server = _object(name={"type": "string"}, version={"type": "string"}, extensions={"type": "array"})
    heads = [
        {
            "name": "Inference-Header-Content-Length", "in": "header", "schema": {"type": "integer", "minimum": 1},
            "description": "length of the JSON when raw tensors follow it",
        }
    ]  # fmt: skip
    paths: dict[str, Any] = {
        "/": {"post": _operation("Hugging Face's inference API", error, nested, classify)},
        "/predict": {"post": _operation("text-embeddings-inference's API", error, {"anyOf": [flat, nested]}, predict)},
        "/invocations": {"post": _operation("the same for SageMaker", error, {"anyOf": [flat, nested]}, predict)},
        "/models/{name}": {"post": _operation("Hugging Face's API of one model", error, nested, classify, [name])},
        "/info": {"get": _operation("the first model, in text-embeddings-inference's words", error, _object())},
        "/ping": {"get": _operation("ready", error, health, fails=health)},
        "/health": {"get": _operation("ready", error, health, fails=health)},
        "/v2": {"get": _operation("the server", error, server)},
        "/v2/health/live": {"get": _operation("live", error, _object(live={"type": "boolean"}))},
        "/v2/health/ready": {"get": _operation("ready", error, health, fails=health)},
    }
    for path, parameters in (
        ("/v2/models/{name}", [name]),
        ("/v2/models/{name}/versions/{version}", [name, version]),
    ):
        paths[path] = {"get": _operation("a model's inputs and outputs", error, metadata, parameters=parameters)}
        paths[f"{path}/ready"] = {
            "get": _operation("whether a model answers", error, model_ready, parameters=parameters, fails=model_ready)
        }
        paths[f"{path}/infer"] = {
            "post": _operation(
                "Open Inference Protocol", error, inferred, infer, [*parameters], heads, "application/octet-stream"
            )
        }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "kdexport", "version": __version__, "description": "Distilled ONNX models behind HTTP."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/health", "/ping"):
            paths[path]["get"]["security"] = []
        for path in paths.values():
            for operation in path.values():
                operation["responses"]["401"] = _refused("no key, or a wrong one", error)
    return found


def _amend(components: dict[str, Any]) -> None:
    """What msgspec's schema can't know: data of any JSON, and counts that are checked later."""
    components["InputTensor"]["properties"]["data"] = {"type": "array"}


def _operation(
    summary: str,
    error: dict[str, Any],
    answer: dict[str, Any],
    body: dict[str, Any] | None = None,
    parameters: list[dict[str, Any]] | None = None,
    headers: list[dict[str, Any]] | None = None,
    also: str = "",
    fails: dict[str, Any] | None = None,
) -> dict[str, Any]:
    content = {"application/json": {"schema": answer}}
    if also:
        content[also] = {"schema": {}}
    refused = {code: _refused(text, error) for code, text in _BAD.items()}
    if fails:
        refused["503"] = _refused("not ready", {"anyOf": [fails, error]})
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "the answer", "content": content}, **refused},
    }
    if body:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters or headers:
        found["parameters"] = [*(parameters or []), *(headers or [])]
    return found


def _refused(text: str, error: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": error}}}


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
