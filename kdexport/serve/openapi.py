"""The OpenAPI document: its schemas come from the very types that requests are decoded with.

`tests/serve/test_openapi.py` asks the server everything that the document allows, and much that it does not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

from kdexport import __version__
from kdexport.serve.protocols import huggingface, oip, openai, tei, tgi
from kdexport.serve.schemas import (
    Class,
    Error,
    InferAnswer,
    Info,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
)
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
    tgi.WriteRequest: [
        {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 5}},
        {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 5, "temperature": 0.8}, "stream": True},
    ],
}
# What each event of a stream holds.
_STREAMED = {tgi.WriteRequest: tgi.StreamToken, openai.CompletionRequest: openai.Completion}
# Of language models, an Open Inference Protocol's request.
_WRITTEN: list[Any] = [
    {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Once upon a time"]}],
        "parameters": {"max_new_tokens": 5, "temperature": 0.8},
        "outputs": [{"name": "text"}],
    }
]
_TYPES = [
    huggingface.ClassifyRequest, tei.PredictRequest, oip.InferRequest, Class, Error, Live, Ready, ModelReady,
    ServerMetadata, ModelMetadata, InferAnswer, Info, tgi.WriteRequest, tgi.Generated, tgi.StreamToken, tgi.WriterInfo,
    openai.CompletionRequest, openai.Completion, openai.ModelList,
]  # fmt: skip


class Served(NamedTuple):
    """What is behind the paths.

    `names` may stand in them; so may `versions`, which change when a model is loaded anew. `writers` are the language
    models with the tokens that each writes at most.
    """

    names: tuple[str, ...]
    versions: tuple[str, ...] = ()
    writers: tuple[tuple[str, int], ...] = ()

    @property
    def writing(self) -> list[str]:
        """The names of language models."""
        return [name for name, _ in self.writers]

    @property
    def first_writes(self) -> bool:
        """Whether the default is a language model."""
        return bool(self.names) and self.names[0] in self.writing


@lru_cache(maxsize=1)  # to make it takes as long as an inference, and anyone may ask for it
def document(served: Served, settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1 of the public port; the settings are the limits, and whether requests need a key."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    _tighten(schemas, settings)
    _tighten_writing(schemas, served, settings)
    keys = {"bearer": {"type": "http", "scheme": "bearer"}} | {
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "kdexport", "version": __version__, "description": "Distilled ONNX models behind HTTP."},
        "paths": _paths(served, bool(settings.api_keys)),
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


def _paths(served: Served, keyed: bool) -> dict[str, Any]:
    label = _named(Class)
    nested = {"type": "array", "items": {"type": "array", "items": label}}
    flat = {"anyOf": [{"type": "array", "items": label}, nested]}
    written: Schema = {"type": "array", "items": _named(tgi.Generated)}
    name = _parameter("name", "path", {"type": "string", "enum": served.names})
    version = _parameter(
        "version", "path", {"type": "string", "pattern": "^[0-9a-f]{12}$", "examples": served.versions}
    )

    def get(id: str, summary: str, answer: type, parameters: list[Schema] | None = None, open: bool = True) -> Schema:
        found = _operation(id, summary, {"application/json": {"schema": _named(answer)}}, parameters or [])
        if answer in (Ready, ModelReady):  # "not yet" has the answer's own shape
            found["responses"]["503"] = _response(
                _ANY["503"], {"anyOf": [_named(answer), _named(Error)]}, _HEADERS["503"]
            )
        return {"get": found if open or not keyed else _locked(found)}

    def post(
        id: str, summary: str, asked: type, answer: Schema, parameters: list[Schema] | None = None, *further: Schema
    ) -> Schema:
        found = _operation(id, summary, {"application/json": {"schema": answer}}, parameters or [], _OF_BODIES)
        examples = {str(i): {"value": value} for i, value in enumerate(_examples(asked, served), 1)}
        content = {"application/json": {"schema": _named(asked), "examples": examples}}
        found["requestBody"] = {"required": True, "content": content}
        if asked is not oip.InferRequest:
            found["responses"] |= _references(_UNFIT)
        if asked in _STREAMED:
            found["responses"]["200"]["content"]["text/event-stream"] = {"schema": _event(_STREAMED[asked])}
        if asked in (tei.PredictRequest, openai.CompletionRequest):  # the model may be one that does something else
            found["responses"] |= _references(_NOT_FOUND)
        return {"post": _locked(found) if keyed else found}

    def infer(id: str, summary: str, writes: bool, parameters: list[Schema] | None = None) -> Schema:
        if writes:
            return post(id, summary, tgi.WriteRequest, written, parameters)
        return post(id, summary, huggingface.ClassifyRequest, nested, parameters)

    def either(first: Schema, second: Schema) -> Schema:
        """Of models of both kinds: what one of them takes and gives."""
        bodies = [one["post"]["requestBody"]["content"]["application/json"] for one in (first, second)]
        answers = [one["post"]["responses"]["200"]["content"] for one in (first, second)]
        examples = [*bodies[0]["examples"].values(), *bodies[1]["examples"].values()]
        bodies[0]["schema"] = {"anyOf": [body["schema"] for body in bodies]}
        bodies[0]["examples"] = {str(i): one for i, one in enumerate(examples, 1)}
        both = {"anyOf": [one["application/json"]["schema"] for one in answers]}
        answers[0] |= answers[1] | {"application/json": {"schema": both}}
        return first

    by_name = [
        infer("inferBy", "Hugging Face's API", writes, [name])
        for writes in (False, True)
        if (served.writing if writes else set(served.names) - set(served.writing) or not served.names)
    ]
    html = {"text/html": {"schema": {"type": "string"}}}
    paths = {
        "/": {"get": _operation("page", "A page for people", html, [])}
        | infer("inferFirst", "Hugging Face's API, of the first model", served.first_writes),
        "/models/{name}": by_name[0] if len(by_name) == 1 else either(*by_name),
        "/v1/completions": post(
            "complete", "OpenAI's API, of language models", openai.CompletionRequest, _named(openai.Completion)
        ),
        "/v1/models": get("writers", "The language models, as OpenAI lists them", openai.ModelList, open=False),
        "/predict": post("predict", "text-embeddings-inference's API", tei.PredictRequest, flat),
        "/invocations": infer("invocations", "The same as /, at SageMaker's path", True)
        if served.first_writes
        else post("invocations", "The same, at SageMaker's path", tei.PredictRequest, flat),
        "/info": get(
            "info",
            "The first model, in text-embeddings-inference's words, or text-generation-inference's",
            tgi.WriterInfo if served.first_writes else Info,
            open=False,
        ),
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
        tensors = post(f"infer{of}", "Open Inference Protocol", oip.InferRequest, _named(InferAnswer), parameters)
        paths[f"{path}/infer"] = _with_raw_tensors(tensors)
    return paths


def _event(holds: type) -> Schema:
    """One server-sent event, as OpenAPI describes streams until 3.2."""
    data: Schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": _named(holds)}
    if holds is openai.Completion:
        data = {"anyOf": [data, {"const": "[DONE]"}]}
    about = "When `stream` is true: one event a token; an error ends the stream as one, like `Error`."
    return {"type": "object", "description": about, "properties": {"data": data}, "required": ["data"]}


def _examples(asked: type, served: Served) -> list[Any]:
    if asked is openai.CompletionRequest:
        model = next(iter(served.writing), "NAME")
        return [{"model": model, "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0.8}]
    return _WRITTEN if asked is oip.InferRequest and served.first_writes else _EXAMPLES[asked]


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
    schemas["ClassifyRequest"]["properties"]["stream"] = {"type": "null", "default": None}
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
    schemas["Parameters"]["properties"]["top_k"] = _whole(1, 2**31)


def _tighten_writing(schemas: dict[str, Schema], served: Served, settings: Settings) -> None:
    """The same of language models."""
    text: Schema = {"type": "string", "maxLength": settings.max_chars}
    most = min((most for _, most in served.writers), default=2**31)
    write, parameters = schemas["WriteRequest"]["properties"], schemas["WriteParameters"]["properties"]
    complete = schemas["CompletionRequest"]["properties"]
    write["inputs"] = complete["prompt"] = text
    parameters["max_new_tokens"] = complete["max_tokens"] = _whole(1, most)
    parameters["top_k"] = complete["top_k"] = _whole(0, 2**31)
    parameters["seed"] = complete["seed"] = _whole(0, 2**63 - 1)
    for properties, neutral in ((parameters, tgi.NEUTRAL), (complete, openai.NEUTRAL)):
        for name, value in neutral.items():
            properties[name] = {"enum": [None] if value is None else [value, None], "default": None}
    if served.writing:
        complete["model"] = {"enum": served.writing}
    outputs = [*(oip.WRITTEN if served.writing else ()), *([] if served.first_writes else oip.OUTPUTS)]
    schemas["RequestedOutput"]["properties"]["name"] = {"enum": outputs}


def _whole(least: int, most: int) -> Schema:
    number = {"type": "integer", "minimum": least, "maximum": most}
    return {"anyOf": [number, {"type": "null"}], "default": None}


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
