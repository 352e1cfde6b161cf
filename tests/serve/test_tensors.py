"""What the Open Inference Protocol's parser does with anything at all: a result, or a refusal; never a crash."""

from __future__ import annotations

import json
import tracemalloc
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from kdexport.serve.http import Refused, Request
from kdexport.serve.protocols import oip
from kdexport.serve.settings import Settings
from kdexport.serve.tensors import DATATYPES, InputTensor, raw_array, raw_texts, read_json, read_raw
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.text_classification import TextClassification

VOCABULARY, MAX_LENGTH, MAX_ROWS, MAX_CHARS = 100, 16, 8, 1000
INPUTS = ["input_ids", "attention_mask"]
TASK = TextClassification(
    TaskConfig(task="text-classification", labels=["a", "b"], inputs=INPUTS, max_length=MAX_LENGTH),
    Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")),
)
VERSION: Any = SimpleNamespace(name="m", version="1", task=TASK, generator=None, cost=TASK.cost)
# JSON has no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHAPES = array_shapes(min_dims=1, max_dims=4, max_side=4)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parse(body: bytes, length: bytes | None = None) -> oip.Query:
    headers = [] if length is None else [(oip.HEADER_LENGTH, length)]
    request = Request({"method": "POST", "path": "/", "headers": headers}, None)
    return oip.parse(request, body, VERSION, Settings(max_rows=MAX_ROWS, max_chars=MAX_CHARS))


def answered(body: bytes, length: bytes | None = None) -> bool:
    """Whether it is taken; all else than a refusal with 400 or 413 is a fault, and so is memory without bounds."""
    found: oip.Query | Refused
    tracemalloc.start()
    try:
        found = parse(body, length)
    except Refused as refused:
        found = refused
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 300_000 + 200 * len(body)
    if isinstance(found, Refused):
        assert found.status in (400, 413)
        return False
    assert 1 <= len(found.rows) <= MAX_ROWS
    assert len(found.costs) == len(found.rows)
    return True


@st.composite
def tensors(draw):
    """(datatype, array) of any of the protocol's numeric datatypes."""
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    return datatype, draw(arrays(np.dtype(DATATYPES[datatype]), SHAPES))


# --- what is sent is what is read


@many
@given(tensors())
def test_raw_tensors_come_back_bit_by_bit(tensor):
    datatype, array = tensor
    found = read_raw(InputTensor("x", list(array.shape), datatype), raw_array(array))
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@many
@given(tensors(), st.booleans())
@example(("UINT64", np.array([2**63, 1], "<u8")), True)
def test_json_tensors_come_back_nested_or_flat(tensor, flat):
    datatype, array = tensor
    if array.dtype.kind == "f":
        array = np.nan_to_num(array, posinf=1, neginf=-1)  # JSON has no others
    data = (array.ravel() if flat else array).tolist()
    found = read_json(InputTensor("x", list(array.shape), datatype, data=msgspec.Raw(msgspec.json.encode(data))))
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@many
@given(st.lists(TEXT, max_size=6))
def test_texts_come_back_and_are_what_tritonclient_reads_and_writes(texts):
    raw = raw_texts(texts)
    tensor = InputTensor("x", [len(texts)], "BYTES", data=msgspec.Raw(msgspec.json.encode(texts)))
    assert read_raw(tensor, raw) == read_raw(tensor, memoryview(raw)) == read_json(tensor) == texts
    assert [text.decode() for text in deserialize_bytes_tensor(raw)] == texts
    if texts:
        theirs = serialize_byte_tensor(np.array([text.encode() for text in texts], dtype=np.object_))
        assert theirs.item() == raw


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("BYTES", [2], '["a"]', "1 elements; shape [2] takes 2"),
        ("BYTES", [1], "[1]", "holds something else than texts"),
        ("BYTES", [1], '[["a"]]', "holds something else than texts"),
        ("BYTES", [1], '"a"', "is no list"),
        ("BYTES", [1], "null", "is no list"),
        ("INT8", [1], "[128]", "beyond INT8"),
        ("UINT8", [1], "[-1]", "beyond UINT8"),
        ("INT64", [1], "[9223372036854775808]", "beyond INT64"),
        ("INT64", [1], "[1.0]", "is not INT64"),
        ("INT64", [1], "[true]", "is not INT64"),
        ("INT64", [1], "[null]", "is not INT64"),
        ("BOOL", [1], "[1]", "is not BOOL"),
        ("FP32", [1], "[1e39]", "beyond FP32"),
        ("FP64", [1], f"[{10**400}]", "beyond FP64"),
        ("INT64", [2, 2], "[[1,2],[3]]", "not of shape"),
        ("INT64", [2, 3], "[[1,2],[3,4,5,6]]", "not of shape"),
        ("INT64", [2, 2], "[[1,2],3,4]", "not of shape"),
        ("INT64", [1, 2], "[1,[2]]", "is not INT64"),
        ("INT64", [1, 2], "[[[1,2]]]", "not of shape"),
    ],
)
def test_data_that_is_not_what_it_says_is_refused(datatype, shape, data, says):
    with pytest.raises(Refused) as refused:
        read_json(InputTensor("x", shape, datatype, data=msgspec.Raw(data.encode())))
    assert refused.value.status == 400
    assert says in refused.value.message


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "says"),
    [
        ("INT64", [1], bytes(7), "has 7 bytes; shape [1] takes 8"),
        ("INT64", [2**31] * 8, bytes(8), "takes"),
        ("BYTES", [1], b"\x02\0\0\0a", "goes beyond its end"),
        ("BYTES", [1], b"\xff\xff\xff\xffa", "goes beyond its end"),
        ("BYTES", [1], b"\0\0\0", "goes beyond its end"),
        ("BYTES", [1], b"\x01\0\0\0\xff", "is not UTF-8"),
        ("BYTES", [1], bytes(8), "2 elements; shape [1] takes 1"),
    ],
)
def test_raw_data_that_is_not_what_it_says_is_refused(datatype, shape, raw, says):
    with pytest.raises(Refused) as refused:
        read_raw(InputTensor("x", shape, datatype), raw)
    assert refused.value.status == 400
    assert says in refused.value.message


# --- whole requests


def binary(texts: list[str], **more: Any) -> tuple[bytes, int]:
    raw = raw_texts(texts)
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + raw, len(head)


@many
@given(st.lists(TEXT, min_size=1, max_size=MAX_ROWS), st.booleans(), st.none() | TEXT)
def test_texts_are_read_alike_as_json_and_raw(texts, pairs, id):
    columns = {"text": texts} | ({"text_pair": texts[::-1]} if pairs else {})
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    inputs = [{"name": k, "shape": [len(v)], "datatype": "BYTES", "data": v} for k, v in columns.items()]
    asked = parse(json.dumps({"id": id, "inputs": inputs}).encode())
    assert asked.rows == rows
    assert asked.id == id
    if not pairs:
        body, length = binary(texts, id=id)
        assert parse(body, b"%d" % length).rows == rows


@many
@given(st.data(), st.integers(1, MAX_ROWS), st.integers(1, MAX_LENGTH), st.booleans())
def test_encoded_rows_are_read_alike_as_json_and_raw(data, rows, length, flat):
    ids = data.draw(arrays(np.int64, (rows, length), elements=st.integers(0, VOCABULARY - 1)))
    mask = data.draw(arrays(np.int64, (rows, length), elements=st.integers(0, 1)))
    inputs = [
        {"name": name, "shape": [rows, length], "datatype": "INT64", "data": (a.ravel() if flat else a).tolist()}
        for name, a in zip(INPUTS, (ids, mask), strict=True)
    ]
    raw = [one | {"parameters": {"binary_data_size": 8 * rows * length}} for one in inputs]
    head = json.dumps({"inputs": [{k: v for k, v in one.items() if k != "data"} for one in raw]}).encode()
    for query in (
        parse(json.dumps({"inputs": inputs}).encode()),
        parse(head + raw_array(ids) + raw_array(mask), b"%d" % len(head)),
    ):
        assert query.costs == [length] * rows
        for i, row in enumerate(query.rows):
            np.testing.assert_array_equal(row["input_ids"], ids[i])
            np.testing.assert_array_equal(row["attention_mask"], mask[i])


@settings(many, max_examples=400)
@given(
    st.data(),
    st.lists(TEXT, min_size=1, max_size=3),
    st.none() | st.binary(max_size=14) | st.integers(-(10**13), 10**13).map(lambda n: b"%d" % n),
)
def test_a_mutated_request_is_taken_or_refused(data, texts, other_length):
    body, length = binary(texts, parameters={"timeout": 5, "binary_data_output": True}, outputs=[{"name": "label"}])
    body = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        cut = data.draw(st.integers(0, 3))
        body[at : at + cut] = data.draw(st.binary(max_size=3) | st.sampled_from([b"9", b"-", b'"', b"[", b"}", b"e9"]))
    answered(bytes(body), b"%d" % length if other_length is None else other_length)
    answered(bytes(body))


LIES = st.none() | st.booleans() | st.integers(-1, 2**66) | st.floats() | st.sampled_from(["", "text", "a" * 99])
JSON = st.recursive(LIES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3))
HOSTILE = st.fixed_dictionaries(
    {
        "name": st.sampled_from([*INPUTS, "text", "text_pair"]) | JSON,
        "shape": st.lists(st.sampled_from([0, 1, 2, 2**31]) | st.integers(), max_size=9) | JSON,
        "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | JSON,
    },
    optional={
        "data": st.lists(LIES | st.lists(LIES, max_size=3), max_size=4) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 40) | JSON}) | JSON,
    },
)


@settings(many, max_examples=600)
@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(HOSTILE, max_size=3) | JSON},
        optional={
            "id": JSON,
            "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["label", "logits"])})) | JSON,
            "parameters": st.fixed_dictionaries({"timeout": JSON, "binary_data_output": JSON}) | JSON,
        },
    )
    | JSON,
    st.binary(max_size=40),
)
def test_a_request_of_lies_is_taken_or_refused(content, raw):
    head = json.dumps(content).encode()
    answered(head + raw, b"%d" % len(head))


@many
@given(st.binary(max_size=60), st.none() | st.binary(max_size=14))
def test_no_request_at_all_is_refused(body, length):
    assert not answered(body, length)


@pytest.mark.parametrize("length", ["", "0", "-1", "+9", "9.0", "nine", "0x9", "{beyond}", "9" * 13, "9" * 5000])
def test_a_length_that_is_none_is_refused(length):
    body, json_length = binary(["x"])
    assert answered(body, b"%d" % json_length)
    whole = body[:json_length].replace(b'"parameters": {"binary_data_size": 5}', b'"data": ["x"]')
    assert answered(whole, b"%d" % len(whole))
    for one in (body, whole):
        assert not answered(one, length.format(beyond=len(one) + 1).encode())


@pytest.mark.parametrize(
    "data",
    [
        ["x" * 10_000] + [""] * 10_000,  # numpy would give every text the longest one's room
        [[]] * 10_000,
        [10**4000],
        json.loads("[" * 500 + "]" * 500),
    ],
    ids=["a long text among many", "many lists", "a number of 4,000 digits", "lists in lists"],
)
def test_little_data_takes_little_memory(data):
    for datatype in ("FP32", "INT64", "BOOL", "BYTES"):
        tensor = {"name": "text", "shape": [len(data)], "datatype": datatype, "data": data}
        assert not answered(json.dumps({"inputs": [tensor]}).encode())


def test_null_is_absent():
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"], "parameters": {"content_type": None}}
    nothing = {"id": None, "parameters": None, "outputs": None}
    for more in (nothing, {"outputs": [{"name": "label", "parameters": None}]}):
        assert parse(json.dumps({"inputs": [tensor], **more}).encode()).rows == [{"text": "x"}]
        assert parse(json.dumps({"inputs": [tensor | {"parameters": None}], **more}).encode()).timeout is None


def test_json_nested_without_end_is_refused():
    for text in (b'{"inputs":' + b"[" * 100_000, b'{"inputs":[{"name":"text","shape":[1],"datatype":"FP32","data":'):
        assert not answered(text + b"[" * 100_000)
