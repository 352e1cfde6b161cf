"""Detect weights of an ONNX file in other files, by reading protobuf's wire format without the `onnx` package.

ONNX Runtime opens any file beside a model that one of its tensors names, even without a checksum. The reader follows
every field from a ModelProto to a TensorProto and skips the others by their length, so its time does not depend on the
size of the weights. It is as lenient as protobuf's C++ parser (overlong numbers, bits beyond 32 of a tag, messages in
several parts), except that groups, which no ONNX writer makes, are refused.
"""

import mmap
from pathlib import Path

# Message → number of a field → the message in it.
FIELDS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
        22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}  # fmt: skip
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of TensorProto; location 0 is the tensor itself
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# A language model of 100 layers has about 500,000. Reading a million takes a second.
_MOST_FIELDS = 5_000_000


def has_external_data(model: Path) -> bool:
    """Return whether any tensor of an ONNX file refers to another file; raise ValueError if it is no ONNX file."""
    if not model.stat().st_size:  # an empty file can't be mapped
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _external(data)


def _external(data: bytes | mmap.mmap) -> bool:
    todo, fields = [("ModelProto", 0, len(data))], 0
    while todo:
        message, at, end = todo.pop()
        inner, is_tensor = FIELDS[message], message == "TensorProto"
        while at < end:
            fields += 1
            if fields > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS:,} fields")
            tag, at = _varint(data, at, end, 5)
            number, kind = (tag & 0xFFFFFFFF) >> 3, tag & 7
            value = start = 0
            if kind == _VARINT:
                value, at = _varint(data, at, end, 10)
            elif kind == _BYTES:
                value, start = _varint(data, at, end, 5)
                at = start + value
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            if at > end or not number or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
                raise ValueError(f"no field of {message} at byte {at}")
            if is_tensor and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and (value or kind != _VARINT))):
                return True
            if kind == _BYTES and number in inner:
                todo.append((inner[number], start, at))
    return False


def _varint(data: bytes | mmap.mmap, at: int, end: int, longest: int) -> tuple[int, int]:
    """Read a number of at most `longest` bytes; return it with the offset after it."""
    value = 0
    for i in range(min(longest, end - at)):
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"no number at byte {at}")
