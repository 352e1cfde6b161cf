"""The Open Inference Protocol over gRPC, in HTTP's event loop.

An infer call is converted to HTTP's JSON and raw tensors for `oip.parse`. Metadata carries keys, `authorization:
Bearer KEY` or `x-api-key: KEY`, and `retry-after`. Log and metrics have HTTP's status codes.
"""

import asyncio
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from kdexport import __version__
from kdexport.errors import MissingPackage
from kdexport.serve.app import App
from kdexport.serve.http import CLIENT_GONE, FAILURE, RETRY, SMALL, Refused, Request, encode
from kdexport.serve.large import Limiter, off_loop
from kdexport.serve.protocols import oip
from kdexport.serve.tensors import raw_array, raw_texts

try:
    import grpc
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError
except ImportError as error:
    raise MissingPackage("grpcio" if "grpc" in str(error) else "protobuf", "grpc") from None

# open_inference.proto, compiled by `make proto`; unlike generated code it fits every version of protobuf.
_COMPILED = Path(__file__).with_name("open_inference.binpb").read_bytes()
_FILE = descriptor_pb2.FileDescriptorSet.FromString(_COMPILED).file[0]
_POOL = descriptor_pool.DescriptorPool()  # not the default: a client in this process may have the same names
_POOL.Add(_FILE)
_MESSAGES = {
    message.name: message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_FILE.package}.{message.name}"))
    for message in _FILE.message_type
}
_SERVICE = f"{_FILE.package}.{_FILE.service[0].name}"
_REFUSING_S = 0.5
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT, 422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
# Datatype → the field of a tensor that is not raw.
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class Listener:
    """A listening server."""

    def __init__(self, server: Any, address: str) -> None:
        self._server, self.address = server, address

    async def stop(self, grace: float) -> None:
        """Accept no more calls, and cancel the running ones after `grace` seconds."""
        # gRPC ends calls that arrive during its stop as CANCELLED, as if by the client. So accept calls for a moment
        # more: the closing app answers UNAVAILABLE.
        refusing = min(_REFUSING_S, grace)
        await asyncio.sleep(refusing)
        await self._server.stop(grace - refusing)


async def listen(app: App, host: str, port: int) -> Listener:
    """Serve the app's models over gRPC; port 0: any free one."""
    settings = app.settings
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.body_limit("text")),  # decompressed; files use HTTP
            ("grpc.max_connection_idle_ms", int(1e3 * settings.keep_alive)),
            ("grpc.so_reuseport", 0),  # else a second server could bind the same port and get half of the calls
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    handlers = {
        method.name: grpc.unary_unary_rpc_method_handler(partial(_call, app, method.name))
        for method in _FILE.service[0].method
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    host = f"[{host}]" if ":" in host else host
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    return Listener(server, f"{host}:{bound}")


async def _call(app: App, name: str, data: bytes, context: Any) -> bytes:
    """Answer a call, on bytes: unreadable messages have tracing, metrics, log and error statuses, too."""
    began = time.monotonic()
    request = _request(f"/{_SERVICE}/{name}", context, app.limiter)
    fault, code = "", 200
    app.running += 1
    try:
        with app.tracer.span(request):
            if app.closing:
                raise Refused(503, "the server is going down", RETRY)
            if app.keys and name.startswith("Model"):
                app.keys.check(request)
            if len(data) > SMALL:
                await request.take_slot(len(data), app.settings.timeout)
            try:
                message = _MESSAGES[f"{name}Request"].FromString(data)
            except DecodeError:
                raise Refused(400, "the message can't be read") from None
            return bytes((await _answer(app, name, request, message, context)).SerializeToString())
    except Refused as error:
        refused, code = error, error.status
    except asyncio.CancelledError:  # by the client, or by gRPC at the call's deadline
        left = context.time_remaining()
        code = CLIENT_GONE if left is None or left > 0 else 504
        raise
    except Exception as error:
        fault, code = "".join(traceback.format_exception(error)), 500
        refused = FAILURE
    finally:
        app.running -= 1
        app.answered += 1
        request.end()
        seconds = time.monotonic() - began
        app.metrics.request(request, code, seconds)
        app.log.request(request, code, seconds, fault)
    metadata = tuple((name.decode(), value.decode()) for name, value in refused.headers)
    await context.abort(_STATUS.get(refused.status, grpc.StatusCode.INTERNAL), refused.message, metadata)
    raise AssertionError("abort raises")


async def _answer(app: App, name: str, request: Request, message: Any, context: Any) -> Any:
    response = _MESSAGES[f"{name}Response"]
    match name:
        case "ServerLive":
            return response(live=True)
        case "ServerReady":
            return response(ready=app.ready)
        case "ServerMetadata":
            return response(name="kdexport", version=__version__, extensions=["classification"])
        case "ModelReady":
            try:
                app.models.find(message.name, message.version or None)
            except Refused as refused:
                if refused.status != 503:
                    raise
                return response(ready=False)  # known, but not in service
            return response(ready=app.ready)
        case "ModelMetadata":
            request.wanted_model, request.wanted_version = message.name, message.version or None
            return response(**oip.metadata(app.version(request)))
    return await _infer(app, request, message, context)


async def _infer(app: App, request: Request, message: Any, context: Any) -> Any:
    request.wanted_model, request.wanted_version = message.model_name, message.model_version or None
    version = app.version(request)
    raw = bool(message.raw_input_contents)

    def read() -> oip.Query:
        body, head = _as_http(message, raw)
        request.scope["headers"].insert(0, (oip.HEADER_LENGTH, b"%d" % head))
        return oip.parse(request, body, version, app.settings)

    def respond() -> Any:
        response = _MESSAGES["ModelInferResponse"](
            model_name=version.name, model_version=version.version, id=message.id
        )
        values = oip.outputs_of(version, results, query.outputs)
        for wanted, (datatype, shape, value) in zip(query.outputs, values, strict=True):
            output = response.outputs.add(name=wanted.name, datatype=datatype, shape=shape)
            if raw:
                response.raw_output_contents.append(raw_texts(value) if datatype == "BYTES" else raw_array(value))
            elif datatype == "BYTES":
                output.contents.bytes_contents.extend(text.encode() for text in value)
            else:
                output.contents.fp32_contents.extend(value.ravel().tolist())
        return response

    query = await off_loop(message.ByteSize(), read)
    size = oip.answer_size(version, query)
    timeout = min((t for t in (query.timeout, context.time_remaining()) if t is not None), default=None)
    results = await app.run(request, version, query.rows, query.costs, timeout)
    return await off_loop(size, respond)


def _request(path: str, context: Any, limiter: Limiter) -> Request:
    """Return a call as a `Request` for keys, tracer and log."""
    metadata = context.invocation_metadata()
    headers = [(name.encode(), value.encode() if isinstance(value, str) else value) for name, value in metadata]
    address = unquote(context.peer()).partition(":")[2]  # ipv4:127.0.0.1:5000, ipv6:[::1]:5000, unix:…
    client = (address.rpartition(":")[0].strip("[]"), 0)
    scope = {"type": "grpc", "method": "POST", "path": path, "headers": headers, "client": client}
    request = Request(scope, _no_body, limiter)
    request.protocol = "grpc"
    return request


async def _no_body() -> NoReturn:
    raise RuntimeError("a gRPC call has its message already")


def _as_http(message: Any, raw: bool) -> tuple[bytes, int]:
    """Return the body of the HTTP request, and the length of its JSON."""
    if raw and len(message.raw_input_contents) != len(message.inputs):
        raise Refused(400, "there must be as many raw_input_contents as inputs")
    inputs = []
    for i, tensor in enumerate(message.inputs):
        parameters = _parameters(tensor)
        parameters.pop("binary_data_size", None)
        found: dict[str, Any] = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype}
        if raw:
            if tensor.HasField("contents"):
                raise Refused(400, "inputs come raw or as contents, not as both")
            parameters["binary_data_size"] = len(message.raw_input_contents[i])
        else:
            found["data"] = _contents(tensor)
        inputs.append(found | {"parameters": parameters})
    content = {
        "inputs": inputs,
        "parameters": _parameters(message),
        "outputs": [{"name": output.name, "parameters": _parameters(output)} for output in message.outputs],
    }
    head = encode(content)
    return b"".join((head, *message.raw_input_contents)), len(head)


def _contents(tensor: Any) -> list[Any]:
    wanted = _CONTENTS.get(tensor.datatype)
    if wanted is None:
        raise Refused(400, f"input {tensor.name} is of a datatype that comes raw only, or is none")
    if any(field.name != wanted for field, _ in tensor.contents.ListFields()):
        raise Refused(400, f"the contents of input {tensor.name} must be in {wanted} only")
    values = list(getattr(tensor.contents, wanted))
    if wanted != "bytes_contents":
        return values
    try:
        return [str(value, "utf-8") for value in values]
    except UnicodeDecodeError:
        raise Refused(400, f"a text of input {tensor.name} is not UTF-8") from None


def _parameters(message: Any) -> dict[str, Any]:
    found = {}
    for name, parameter in message.parameters.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is not None:
            found[name] = getattr(parameter, which)
    return found
