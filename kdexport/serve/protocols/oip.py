"""The Open Inference Protocol, version 2, with binary tensors and Triton's classification.

Source: the protocol's inference_rest.md and open_inference_rest.yaml, and Triton's extension_binary_data.md and
extension_classification.md. Inputs are texts (`text`, and `text_pair` for pairs) as BYTES, or the graph's own tensors;
outputs are `label`, `score`, `scores` and `logits`, of speech recognition `text` and `logits`, of vectors
`sentence_embedding`, with one of the model's prompts as the parameter `prompt_name`. With the parameter
`is_split_into_words` the words of a text to tag are those between its single spaces. A language model continues `text`,
with the fields of `Sampling` as parameters. Models of images or sound read a file, as BYTES, in JSON in base64.
"""

import math
from base64 import b64decode
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from kdexport.errors import DataError
from kdexport.runtime.generation import Sampling
from kdexport.serve.generating import Generator, job_of
from kdexport.serve.http import Refused, Request, Response, answer, encode
from kdexport.serve.large import check_answer
from kdexport.serve.registry import Version
from kdexport.serve.settings import Settings
from kdexport.serve.tensors import InputTensor, Parameters, raw_array, raw_texts, read_json, read_raw
from kdexport.tasks.base import can_embed, can_transcribe, reads_files
from kdexport.tasks.inputs.media import Media
from kdexport.tasks.metrics import Array
from kdexport.tasks.sentence_embedding import SentenceEmbedding
from kdexport.tasks.token_classification import TokenClassification

EXTENSIONS = ["binary_tensor_data", "classification"]
HEADER_LENGTH = b"inference-header-content-length"
TEXTS = ("text", "text_pair")
OUTPUTS = {"label": "BYTES", "score": "FP32", "scores": "FP32", "logits": "FP32"}
WRITTEN = {"text": "BYTES"}
HEARD = {"text": "BYTES", "logits": "FP32"}
VECTORS = {"sentence_embedding": "FP32"}
_FLAT = ("label", "score", "text")
_JSON_NUMBER, _RAW_NUMBER = 20, 4  # bytes
# Parameters of the protocol and Triton; a language model's others are fields of `Sampling`.
_OF_PROTOCOL = {"binary_data_output", "timeout", "priority", "sequence_id", "sequence_start", "sequence_end"}
Rows = tuple[list[Any], list[int]]  # with the estimated tokens of each


class RequestedOutput(msgspec.Struct, frozen=True):
    """A requested output."""

    name: str
    parameters: Parameters = None

    def asks(self, parameter: str, default: object = None) -> object:
        """Return a parameter."""
        value = (self.parameters or {}).get(parameter)
        return default if value is None else value


class InferRequest(msgspec.Struct, frozen=True):
    """`POST /v2/models/{name}/infer`; unknown keys, which clients send, are ignored."""

    inputs: Annotated[list[InputTensor], msgspec.Meta(min_length=1, max_length=16)]
    id: str | None = None
    parameters: Parameters = None
    outputs: Annotated[list[RequestedOutput], msgspec.Meta(max_length=16)] | None = None


class Query(NamedTuple):
    """A parsed request."""

    rows: list[Any]
    costs: list[int]
    outputs: list[RequestedOutput]
    binary: bool
    id: str | None
    timeout: float | None


def metadata(version: Version) -> dict[str, Any]:
    """`GET /v2/models/{name}`; -1 is any size."""
    task = version.task
    if reads_files(task):
        tensors = [{"name": name, "datatype": "FP32", "shape": shape} for name, shape in task.shapes().items()]
        tensors.append({"name": task.modality, "datatype": "BYTES", "shape": [1]})
    else:
        encoded = [] if version.generator else task.config.inputs
        tensors = [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        tensors += [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in encoded]
    wide = [-1, *([-1] if task.transcribes else []), task.answer_shape[0] if task.embeds else len(task.labels)]
    outputs = [
        {"name": name, "datatype": datatype, "shape": [-1] if name in _FLAT else wide}
        for name, datatype in _outputs(version).items()
    ]
    facts = {"name": version.name, "versions": [version.version], "platform": "onnxruntime_onnx"}
    return facts | {"inputs": tensors, "outputs": outputs}


def parse(request: Request, body: bytes, version: Version, settings: Settings) -> Query:
    """Parse a request."""
    head, raw = _split(request, body)
    try:
        asked = msgspec.json.decode(head, type=InferRequest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, f"the request can't be read: {error}") from None
    tensors: dict[str, Any] = {}  # arrays, and lists of str
    for tensor in asked.inputs:
        if tensor.name in tensors:
            raise Refused(400, "two inputs have the same name")
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is None:
            tensors[tensor.name] = read_json(tensor)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(raw):
            raise Refused(400, f"binary_data_size of input {tensor.name} is not what the body holds")
        tensors[tensor.name] = read_raw(tensor, raw[:size], files=reads_files(version.task))
        raw = raw[size:]
    if raw:
        raise Refused(400, f"{len(raw)} bytes follow the last input")
    parameters = asked.parameters or {}
    if version.generator:
        rows, costs = _jobs(version.generator, tensors, parameters, settings)
    elif version.task.modality in tensors and reads_files(version.task):
        rows, costs = _files(version, tensors, settings)
    elif reads_files(version.task):
        rows, costs = _encoded_files(version.task, tensors, settings.max_rows)
    elif "text" in tensors:
        rows, costs = _texts(version, tensors, parameters, settings)
    else:
        rows, costs = _encoded_texts(version.task, tensors, settings.max_rows)
    timeout = parameters.get("timeout")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        timeout = 0
    outputs = _wanted(asked.outputs or [], _outputs(version))
    binary = parameters.get("binary_data_output") is True
    return Query(rows, costs, outputs, binary, asked.id, timeout / 1e6 or None)


def render(version: Version, query: Query, results: Sequence[Any]) -> Response:
    """Return the response as JSON, with requested raw tensors behind it."""
    values = outputs_of(version, results, query.outputs)
    outputs, raw = [], []
    for wanted, (datatype, shape, value) in zip(query.outputs, values, strict=True):
        output: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": shape}
        if wanted.asks("binary_data", query.binary) is True:
            raw.append(raw_texts(value) if datatype == "BYTES" else raw_array(value))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = value if datatype == "BYTES" else value.ravel().tolist()
        outputs.append(output)
    content: dict[str, Any] = {"model_name": version.name, "model_version": version.version, "outputs": outputs}
    if query.id is not None:
        content["id"] = query.id
    if not raw:
        return answer(content)
    head = encode(content)
    headers = [(b"content-type", b"application/octet-stream"), (HEADER_LENGTH, b"%d" % len(head))]
    return Response(b"".join((head, *raw)), headers=headers)


def answer_size(version: Version, query: Query) -> int:
    """Estimate a response's bytes; refuse a too large one (413)."""
    size = 0
    for wanted in [] if version.generator else query.outputs:
        *rows, classes = (len(query.rows), *version.task.answer_shape)
        top = wanted.asks("classification", classes)
        most = 1 if wanted.name in _FLAT else min(classes, top) if isinstance(top, int) else classes
        raw = wanted.asks("binary_data", query.binary) is True
        size += math.prod(rows) * most * (_RAW_NUMBER if raw else _JSON_NUMBER)
    return check_answer(size, "give fewer rows, or ask for fewer outputs, or for binary ones")


def outputs_of(
    version: Version, results: Sequence[Any], outputs: Sequence[RequestedOutput]
) -> list[tuple[str, list[int], Any]]:
    """Return (datatype, shape, values: list[str] or float32) of each output."""
    if version.generator:
        return [("BYTES", [len(results)], [job.completion for job in results]) for _ in outputs]
    task = version.task
    logits = np.stack([result.logits for result in results])
    values: dict[str, Any] = {"logits": logits}
    if task.embeds:
        values = {task.output: logits}
    elif can_transcribe(task):
        values["text"] = [one.text for one in task.decode(logits, [])]
    else:
        values["scores"] = scores = np.stack([result.scores for result in results])
        values["label"], values["score"] = _best(task.labels, logits, scores)
    found = []
    for output in outputs:
        value, datatype = values[output.name], _outputs(version)[output.name]
        value = value if datatype == "BYTES" else value.astype(np.float32)
        top = output.asks("classification")
        if top is not None and task.embeds:
            raise Refused(400, "classification is of labels, and a vector has none")
        if top is not None and output.name not in _FLAT:
            found.append(_classes(task.labels, value, top))
        else:
            shape = [len(logits)] if output.name in _FLAT else list(logits.shape)
            found.append((datatype, shape, value))
    return found


def _best(labels: list[str], logits: Array, scores: Array) -> tuple[list[str], Array]:
    """Return each row's label and score [N]; of a row of words, all tags and the lowest score."""
    best, highest = scores.argmax(axis=-1), scores.max(axis=-1)
    if scores.ndim == 2:
        return [labels[i] for i in best], highest
    words = TokenClassification.words_read(logits)
    tags = [" ".join(labels[i] for i in row[:n]) for row, n in zip(best, words, strict=True)]
    return tags, np.where(np.arange(best.shape[1]) < words[:, None], highest, 1.0).min(axis=1)


def _classes(labels: list[str], values: Array, top: object) -> tuple[str, list[int], list[str]]:
    """Triton's classification of values [..., C]: the highest as `value:index:label`, along the last axis."""
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise Refused(400, "classification must be a number from 1 on")
    top = min(top, len(labels))
    rows = values.reshape(-1, values.shape[-1])
    order = np.argsort(-rows, axis=1, kind="stable")[:, :top]
    texts = [f"{row[i]:f}:{i}:{labels[i]}" for row, best in zip(rows, order, strict=True) for i in best]
    return "BYTES", [*values.shape[:-1], top], texts


def _split(request: Request, body: bytes) -> tuple[bytes, memoryview]:
    length = request.header(HEADER_LENGTH)
    if length is None:
        return body, memoryview(b"")
    if not length.isdigit() or len(length) > 12 or not 0 < int(length) <= len(body):
        raise Refused(400, "Inference-Header-Content-Length must be the length of the JSON at the body's start")
    return body[: int(length)], memoryview(body)[int(length) :]


def _outputs(version: Version) -> dict[str, str]:
    """Return the datatype of each output."""
    if version.task.embeds:
        return VECTORS
    return WRITTEN if version.generator else HEARD if version.task.transcribes else OUTPUTS


def _wanted(outputs: list[RequestedOutput], there: dict[str, str]) -> list[RequestedOutput]:
    for output in outputs:
        if output.name not in there:
            raise Refused(400, f"the output{'s are' if len(there) > 1 else ' is'} {', '.join(there)}")
    if len({output.name for output in outputs}) < len(outputs):
        raise Refused(400, "two outputs have the same name")
    return outputs or [RequestedOutput(name) for name in there]


def _jobs(generator: Generator, tensors: dict[str, Any], parameters: dict[str, Any], settings: Settings) -> Rows:
    texts = tensors.get("text")
    if set(tensors) != {"text"} or not isinstance(texts, list):
        raise Refused(400, "the input is `text`, of datatype BYTES")
    if len(texts) > settings.max_rows:
        raise Refused(400, f"a request may have 1 to {settings.max_rows} texts; it has {len(texts)}")
    how = {name: value for name, value in parameters.items() if name not in _OF_PROTOCOL}
    if isinstance(how.get("stop"), str):
        how["stop"] = [how["stop"]]
    how.setdefault("max_new_tokens", min(Sampling().max_new_tokens, generator.room))
    jobs = [job_of(generator, text, how, settings.max_chars, 400) for text in texts]
    return jobs, [one.how.max_new_tokens for one in jobs]


def _files(version: Version, tensors: dict[str, Any], settings: Settings) -> Rows:
    """Read a file: bytes, or base64 of JSON. One a request: decoding many would take seconds."""
    name = version.task.modality
    if len(tensors) > 1 or not isinstance(tensors[name], list) or len(tensors[name]) > 1:
        raise Refused(400, f"the input `{name}`, of datatype BYTES, is one file, and the only input")
    (file,) = tensors[name]
    try:
        content = file if isinstance(file, bytes) else b64decode(file, validate=True)
    except ValueError:
        raise Refused(400, f"the file of input {name} is not base64") from None
    return check_rows(version, [{name: content}], settings, 400)


def _encoded_files(task: Media, tensors: dict[str, Any], max_rows: int) -> Rows:
    wanted, longest = task.shapes(), task.config.audio.length if task.config.audio else 1
    if set(tensors) != set(wanted):
        raise Refused(400, f"the input is {', '.join(wanted)}, or {task.modality}: a file of datatype BYTES")
    for name, (_, *shape) in wanted.items():
        array = tensors[name]
        if isinstance(array, list) or array.dtype != np.float32 or not np.isfinite(array).all():
            raise Refused(400, f"input {name} must be of datatype FP32, and finite")
        rows, *found = array.shape
        fits = [size == n or (size == -1 and n <= longest) for size, n in zip(shape, found, strict=False)]
        if len(found) != len(shape) or not all(fits) or rows > max_rows:
            sizes = ", ".join(f"1…{longest}" if size == -1 else str(size) for size in shape)
            raise Refused(400, f"input {name} must have the shape [1…{max_rows}, {sizes}]")
    return [{name: tensors[name][i] for name in wanted} for i in range(rows)], [1] * rows


def _encoded_texts(task: Any, tensors: dict[str, Any], max_rows: int) -> Rows:
    wanted, longest = task.config.inputs, task.config.max_length
    if set(tensors) != set(wanted):
        raise Refused(400, f"the inputs are `text` (and `text_pair`), or all of {', '.join(wanted)}")
    for name, array in tensors.items():
        if isinstance(array, list) or array.dtype != np.int64:
            raise Refused(400, f"input {name} must be of datatype INT64")
        most = task.vocabulary if name == "input_ids" else 2
        if array.min() < 0 or array.max() >= most:
            raise Refused(400, f"input {name} must be within 0…{most - 1}")
    shape = tensors[wanted[0]].shape
    if len(shape) != 2 or any(array.shape != shape for array in tensors.values()):
        raise Refused(400, f"{', '.join(wanted)} must have one shape: [rows, tokens]")
    rows, length = shape
    if rows > max_rows or length > longest:
        raise Refused(400, f"the shape must be within [1…{max_rows}, 1…{longest}]")
    return [{name: tensors[name][i] for name in wanted} for i in range(rows)], [length] * rows


def _texts(version: Version, tensors: dict[str, Any], parameters: dict[str, Any], settings: Settings) -> Rows:
    for name, texts in tensors.items():
        if name not in TEXTS or not isinstance(texts, list):
            raise Refused(400, "beside `text` there may be `text_pair`, both of datatype BYTES")
    texts, pairs = tensors["text"], tensors.get("text_pair")
    if pairs is not None and len(pairs) != len(texts):
        raise Refused(400, "text and text_pair must be equally many")
    rows = [{"text": text} if pairs is None else {"text": text, "text_pair": pairs[i]} for i, text in enumerate(texts)]
    if can_embed(task := version.task):
        rows = [_with_prompt(task, row, parameters.get("prompt_name")) for row in rows]
    if version.task.has_words and parameters.get("is_split_into_words") is True:
        rows = [{"text": text.split(" ")} for text in texts]
    return check_rows(version, rows, settings, 400)


def _with_prompt(task: SentenceEmbedding, row: dict[str, Any], name: Any) -> dict[str, Any]:
    if "text_pair" in row:
        raise Refused(400, "a vector is of one text: leave text_pair out")
    try:
        task.check_prompt(name)
    except DataError as error:
        raise Refused(400, str(error)) from None
    return row if name is None else row | {"prompt": name}


def check_rows(version: Version, rows: list[dict[str, Any]], settings: Settings, status: int) -> Rows:
    """Check the limits of rows of texts, words or files; `status` is for their number, and for words that are none."""
    if not 1 <= len(rows) <= settings.max_rows:
        raise Refused(status, f"a request may have 1 to {settings.max_rows} texts; it has {len(rows)}")
    for row in rows:
        if any(_characters(text) > settings.max_chars for text in row.values()):
            raise Refused(413, f"a text may have {settings.max_chars:,} characters")
    if version.task.has_words:
        try:
            rows = [version.task.ready(row) for row in rows]
        except DataError as error:
            raise Refused(status, str(error)) from None
    return rows, [version.cost(row) for row in rows]


def _characters(given: Any) -> int:
    """Count the characters of a text, or of words with spaces between them; none of a file."""
    return len(given) if isinstance(given, str) else sum(map(len, given), len(given)) if isinstance(given, list) else 0
