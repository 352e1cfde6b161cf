"""Tensors of the Open Inference Protocol: JSON or raw bytes ↔ numpy."""

import math
import struct
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from kdexport.serve.http import Refused
from kdexport.tasks.metrics import Array

_LENGTH = struct.Struct("<I")
# Datatype → little-endian numpy type, without BYTES.
DATATYPES = {
    "BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "<i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip

Parameter = str | float | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | bool | None
# Some clients send null for unused fields.
Parameters = dict[str, Parameter] | None
Dimension = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
# numpy's kind → types of JSON.
_ELEMENTS: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]  # fmt: skip


class InputTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input: elements in `data`, nested or flat, or `binary_data_size` bytes after the JSON."""

    name: str
    shape: Annotated[list[Dimension], msgspec.Meta(min_length=1, max_length=8)]
    datatype: Datatype
    parameters: Parameters = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # decoded by datatype


def read_json(tensor: InputTensor) -> Any:
    """Return JSON elements as an array of the tensor's shape, or as a list of str for BYTES; refuse others (400)."""
    if isinstance(tensor.data, msgspec.UnsetType):
        raise Refused(400, f"input {tensor.name} has no data")
    try:
        values = msgspec.json.decode(tensor.data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refused(400, f"the data of input {tensor.name} can't be read") from None
    if not isinstance(values, list):
        raise Refused(400, f"the data of input {tensor.name} is no list")
    elements = _counted(tensor, _flat(tensor, values), math.prod(tensor.shape))
    if tensor.datatype == "BYTES":
        if not all(isinstance(text, str) for text in elements):
            raise Refused(400, f"input {tensor.name} is of datatype BYTES and holds something else than texts")
        return elements
    wanted = np.dtype(DATATYPES[tensor.datatype])
    # Before numpy, which would allocate the longest text's size for every element.
    if not set(map(type, elements)) <= _ELEMENTS[wanted.kind]:
        raise Refused(400, f"the data of input {tensor.name} is not {tensor.datatype}")
    try:
        with np.errstate(over="raise"):
            array = np.array(elements, wanted)
    except (OverflowError, FloatingPointError):
        raise Refused(400, f"the data of input {tensor.name} is beyond {tensor.datatype}") from None
    return array.reshape(tensor.shape)


def read_raw(tensor: InputTensor, raw: bytes | memoryview, files: bool = False) -> Any:
    """Return the same from raw little-endian bytes in C order; a text is a 4-byte length and UTF-8.

    With `files`, elements of BYTES are files: a list of bytes.
    """
    size = math.prod(tensor.shape)  # Python's integers don't overflow
    if tensor.datatype == "BYTES":
        texts: list[Any] = []
        at, end = 0, len(raw)
        while at < end:
            if end - at < _LENGTH.size or end - at - _LENGTH.size < (n := _LENGTH.unpack_from(raw, at)[0]):
                raise Refused(400, f"a text of input {tensor.name} goes beyond its end")
            at += _LENGTH.size
            try:
                texts.append(bytes(raw[at : at + n]) if files else str(raw[at : at + n], "utf-8"))
            except UnicodeDecodeError:
                raise Refused(400, f"a text of input {tensor.name} is not UTF-8") from None
            at += n
        return _counted(tensor, texts, size)
    wanted = np.dtype(DATATYPES[tensor.datatype])
    if len(raw) != size * wanted.itemsize:
        takes = size * wanted.itemsize
        raise Refused(400, f"input {tensor.name} has {len(raw)} bytes; shape {tensor.shape} takes {takes}")
    return np.frombuffer(raw, wanted).reshape(tensor.shape)


def raw_texts(texts: list[str]) -> bytes:
    """Return texts as raw BYTES elements."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (_LENGTH.pack(len(text)), text))


def raw_array(array: Array) -> bytes:
    """Return an array as raw elements."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _counted(tensor: InputTensor, values: Any, size: int) -> Any:
    if len(values) != size:
        raise Refused(400, f"input {tensor.name} has {len(values)} elements; shape {tensor.shape} takes {size}")
    return values


def _flat(tensor: InputTensor, values: list[Any]) -> list[Any]:
    """Flatten elements that are nested as the shape says, or flat already."""
    if values and isinstance(values[0], list):
        for length in tensor.shape[1:]:
            if not all(isinstance(value, list) and len(value) == length for value in values):
                raise Refused(400, f"the data of input {tensor.name} is not of shape {tensor.shape}")
            values = [one for value in values for one in value]
    return values
