"""A .proto file → message classes, at run time: no generated code to keep, nor to match protobuf's version.

It reads what `open_inference.proto` is written in: messages in messages, scalars, `repeated`, `map` and `oneof`, and
services. The classes live in a pool of their own: a client of the same protocol in this process keeps its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

_TOKEN = re.compile(r'//[^\n]*|"[^"]*"|[\w.]+|[^\s\w]')


class Proto(NamedTuple):
    """What a file declares."""

    package: str
    messages: dict[str, Any]
    """Name → class."""
    services: dict[str, dict[str, tuple[str, str]]]
    """Service → method → the names of what it takes and gives."""


def load(path: Path) -> Proto:
    """The messages and services of a file."""
    file, services = FileDescriptorProto(name=path.name, syntax="proto3"), {}
    tokens = (token for token in _TOKEN.findall(path.read_text(encoding="utf-8")) if not token.startswith("//"))
    for token in tokens:
        match token:
            case "syntax":
                _until(tokens, ";")
            case "package":
                file.package = _until(tokens, ";")[0]
            case "message":
                _message(tokens, file.message_type.add(name=next(tokens)))
            case "service":
                name = next(tokens)
                methods = re.findall(r"rpc (\w+) \( (\w+) \) returns \( (\w+) \)", " ".join(_until(tokens, "}")))
                services[name] = {method: (takes, gives) for method, takes, gives in methods}
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    messages = {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{message.name}"))
        for message in file.message_type
    }
    return Proto(file.package, messages, services)


def _message(tokens: Iterator[str], message: DescriptorProto) -> None:
    """Everything from a message's `{` to its `}`."""
    in_oneof = False
    for token in tokens:
        if token == "message":
            _message(tokens, message.nested_type.add(name=next(tokens)))
        elif token == "oneof":
            message.oneof_decl.add(name=next(tokens))
            in_oneof = True
        elif token == "}":
            if not in_oneof:
                return
            in_oneof = False
        elif token != "{":
            field = _field(message, [token, *_until(tokens, ";")])
            if in_oneof:
                field.oneof_index = len(message.oneof_decl) - 1


def _field(message: DescriptorProto, words: list[str]) -> FieldDescriptorProto:
    """`[repeated] TYPE NAME = NUMBER`; a map is what it is on the wire: repeated entries of a key and a value."""
    *kind, name, _, number = words
    field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
    if kind[0] in ("repeated", "map"):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    if kind[0] == "map":  # map < KEY , VALUE >
        entry = message.nested_type.add(name=f"{name.title()}Entry".replace("_", ""))
        entry.options.map_entry = True
        _field(entry, [kind[2], "key", "=", "1"])
        _field(entry, [kind[4], "value", "=", "2"])
        kind = [entry.name]
    scalar = f"TYPE_{kind[-1].upper()}"
    if scalar in FieldDescriptorProto.Type.DESCRIPTOR.values_by_name:
        field.type = FieldDescriptorProto.Type.Value(scalar)
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, kind[-1]
    return field


def _until(tokens: Iterator[str], end: str) -> list[str]:
    return list(iter(tokens.__next__, end))
