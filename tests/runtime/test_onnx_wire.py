"""Weights in other files are found in every place of a model, however protobuf writes it."""

from __future__ import annotations

import time

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from kdexport.runtime.onnx_wire import FIELDS, has_external_data

MESSAGE = FieldDescriptor.TYPE_MESSAGE
EXTERNAL = onnx.TensorProto(name="w", data_location="EXTERNAL")
EXTERNAL.external_data.add(key="location", value="weights.bin")


def fields_to_tensors() -> dict[str, dict[int, str]]:
    """Every field of ONNX's own definition that leads from a model to a tensor."""
    seen, todo = {}, [onnx.ModelProto.DESCRIPTOR]
    while todo:
        message = todo.pop()
        if message.name not in seen:
            seen[message.name] = {f.number: f.message_type.name for f in message.fields if f.type == MESSAGE}
            todo += [f.message_type for f in message.fields if f.type == MESSAGE]
    leads = {"TensorProto"}
    while more := {name for name, fields in seen.items() if leads & set(fields.values())} - leads:
        leads |= more
    return {name: {n: to for n, to in seen[name].items() if to in leads} for name in leads}


def test_every_field_that_leads_to_a_tensor_is_followed():
    assert fields_to_tensors() == FIELDS


# --- any model, written in any way that protobuf reads


@st.composite
def models(draw) -> onnx.ModelProto:
    """A model with tensors in any places, some of them external."""

    def tensor(t: onnx.TensorProto) -> None:
        t.name, t.raw_data = "w", draw(st.binary(max_size=20))
        t.dims.extend(draw(st.lists(st.integers(0, 300), max_size=3)))
        match draw(st.sampled_from(["", "", "", "", "location", "entry", "both"])):
            case "location":
                t.data_location = onnx.TensorProto.EXTERNAL
            case "entry":
                t.external_data.add(key="location", value="weights.bin")
            case "both":
                t.CopyFrom(EXTERNAL)
        if draw(st.booleans()) and not t.external_data and not t.data_location:
            t.data_location = onnx.TensorProto.DEFAULT

    def fill(message: Message, depth: int) -> None:
        if message.DESCRIPTOR.name == "TensorProto":
            return tensor(message)
        for field in message.DESCRIPTOR.fields:
            if field.number not in FIELDS[message.DESCRIPTOR.name] or depth > 5:
                continue
            for _ in range(draw(st.sampled_from([0, 0, 1, 1] if not field.is_repeated else [0, 0, 1, 2]))):
                child = getattr(message, field.name)
                fill(child.add() if field.is_repeated else child, depth + 1)
        for field in message.DESCRIPTOR.fields:
            if field.name in ("doc_string", "domain") and draw(st.booleans()):
                setattr(message, field.name, draw(st.sampled_from(["location", "external_data", "j\x0a\x08location"])))

    model = onnx.ModelProto(ir_version=8)
    fill(model, 0)
    return model


def is_external(message: Message) -> bool:
    """What protobuf itself finds."""
    if isinstance(message, onnx.TensorProto):
        return bool(message.external_data) or message.data_location == onnx.TensorProto.EXTERNAL
    for field, value in message.ListFields():
        if field.type == MESSAGE and field.number in FIELDS[message.DESCRIPTOR.name]:
            children = value if field.is_repeated else [value]
            if any(is_external(child) for child in children):
                return True
    return False


def varint(value: int, spare: int = 0, upper: int = 0) -> bytes:
    """A number in `spare` bytes more than it needs, five at most; `upper` bits of the fifth, which protobuf drops."""
    shortest = max(1, -(-value.bit_length() // 7))
    size = min(5, shortest + spare)
    out = [value >> 7 * i & 0x7F | (0x80 if i < size - 1 else 0) for i in range(size)]
    if size == 5:
        out[4] |= upper & 0x70
    return bytes(out)


def parts(message: Message) -> list[Message]:
    """A message as several ones, each with one value of one field; protobuf merges them."""
    found = []
    for field, value in message.ListFields():
        for one in value if field.is_repeated else [value]:
            part = type(message)()
            if field.type == MESSAGE:
                child = getattr(part, field.name)
                (child.add() if field.is_repeated else child).CopyFrom(one)
            elif field.is_repeated:
                getattr(part, field.name).append(one)
            else:
                setattr(part, field.name, one)
            found.append(part)
    return found


def written(message: Message, draw, upper: int) -> bytes:
    """A message in one of protobuf's many ways: any order of parts, long numbers, fields that nobody knows."""
    out = []
    for part in parts(message):
        ((field, value),) = part.ListFields()
        if field.type != MESSAGE:
            out.append(part.SerializeToString())
            continue
        child = value[0] if field.is_repeated else value
        bodies = [child]
        if not field.is_repeated and len(parts(child)) > 1:  # in two parts, to be merged
            bodies = [type(child)(), type(child)()]
            for i, piece in enumerate(parts(child)):
                bodies[i % 2].MergeFrom(piece)
        for body in bodies:
            content = written(body, draw, upper)
            tag = varint(field.number << 3 | 2, draw(st.integers(0, 4)), upper)
            out.append(tag + varint(len(content), draw(st.integers(0, 4))) + content)
    unknown = [varint(999 << 3) + varint(7, 3), varint(998 << 3 | 1) + bytes(8), varint(997 << 3 | 5) + bytes(4)]
    out += draw(st.lists(st.sampled_from([*unknown, varint(996 << 3 | 2) + b"\x0a\x0a\x08location"]), max_size=2))
    return b"".join(draw(st.permutations(out)))


@settings(max_examples=60, deadline=None)
@given(st.data(), models(), st.sampled_from([0, 0x10, 0x70]))
def test_any_model_is_read_as_protobuf_reads_it(tmp_path_factory, data, model, upper):
    content = written(model, data.draw, upper)
    if not upper:  # Python's protobuf refuses what the C++ one of ONNX Runtime drops
        assert is_external(onnx.ModelProto.FromString(content)) == is_external(model)
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    assert has_external_data(path) == is_external(model)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.binary(max_size=12))
def test_no_bytes_do_anything_but_be_read_or_refused(tmp_path_factory, data, some):
    whole = onnx.ModelProto(graph=onnx.GraphProto(initializer=[EXTERNAL])).SerializeToString()
    at = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(whole[:at] + some + whole[at + data.draw(st.sampled_from([0, len(some)])) :])
    try:
        found = has_external_data(path)
    except ValueError:
        return
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except Exception:
        return
    assert found or not is_external(model)


@pytest.mark.parametrize(
    "content",
    [
        b"garbage", b"\x00", b"\x3b\x3c", b"\x3a\x05", b"\x3a\xff\xff\xff\xff\x7f", b"\x80" * 11, b"\x80" * 5 + b"\x01",
        b"\x08" + b"\xff" * 11, b"\x09\x00", b"\x06", b"\x07", b"\x03", b"\x18\x00\x00\x00ORTM",
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"no (field|number)"):
        has_external_data(tmp_path / "model.onnx")


def test_subgraphs_may_be_nested_deep(tmp_path):
    content = onnx.GraphProto(initializer=[EXTERNAL]).SerializeToString()
    for _ in range(5_000):
        attribute = b"\x32" + varint(len(content)) + content
        node = b"\x2a" + varint(len(attribute)) + attribute
        content = b"\x0a" + varint(len(node)) + node
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + varint(len(content)) + content)
    assert has_external_data(tmp_path / "model.onnx")


def test_a_large_model_takes_no_longer_than_a_small_one(tmp_path):
    size = 600_000_000
    tensor = b"\x4a" + varint(size)  # raw_data, of which the file holds nothing but a hole
    graph = b"\x2a" + varint(len(tensor) + size) + tensor
    with (tmp_path / "model.onnx").open("wb") as file:
        file.write(b"\x3a" + varint(len(graph) + size) + graph)
        file.truncate(file.tell() + size)
    began = time.process_time()
    assert not has_external_data(tmp_path / "model.onnx")
    assert time.process_time() - began < 0.5


def test_fields_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kdexport.runtime.onnx_wire._MOST_FIELDS", 1_000)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08" * 1_001)
    with pytest.raises(ValueError, match="more than 1,000 fields"):
        has_external_data(tmp_path / "model.onnx")
