"""What comes back, as types: for the OpenAPI document, which makes its schemas of them."""

from __future__ import annotations

from typing import Any

import msgspec


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
