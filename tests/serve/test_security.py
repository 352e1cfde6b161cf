"""Hostile requests, one by one, to the real server: each is refused, and the next good one is answered."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serve_process import Served, served
from wire import GOOD, Wire, ask, assert_refused, is_well, request

INFER = "/v2/models/news/infer"
IDS = [101, 2000, 2001, 102]
# What all of this together may take; a single bomb that goes off takes gigabytes.
MOST_GROWTH_KB = 200_000


def memory_kb(server: Served, what: str) -> int:
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1])


@pytest.fixture(scope="module")
def server(finished):
    with served(f"news={finished}", "--access-log", "off") as found:
        assert is_well(found.url)
        before = memory_kb(found, "VmRSS")
        yield found
        assert memory_kb(found, "VmHWM") - before < MOST_GROWTH_KB
    assert not any("Traceback" in line or "Warning" in line for line in found.log)


@pytest.fixture(autouse=True)
def unharmed(server):
    yield
    assert is_well(server.url)


def tensor(name: str = "text", **changes: object) -> dict:
    return {"name": name, "shape": [1], "datatype": "BYTES", "data": ["hello"]} | changes


def infer(*inputs: dict, **more: object) -> bytes:
    return json.dumps({"inputs": inputs or [tensor()], **more}).encode()


def of_ids(server: Served, ids: list, mask: object = 1) -> bytes:
    """The graph's own tensors, one row."""
    names = [found["name"] for found in ask(server.url, "/v2/models/news").json["inputs"][1:]]
    values = {"input_ids": ids, "attention_mask": [mask] * len(ids)}
    shape = [1, len(ids)]
    return infer(
        *(tensor(name, datatype="INT64", shape=shape, data=values.get(name, [0] * len(ids))) for name in names)
    )


# --- names and paths


@pytest.mark.parametrize(
    "path", ["/v2/models/{}", "/v2/models/{}/infer", "/v2/models/{}/versions/1/infer", "/models/{}"]
)
@pytest.mark.parametrize(
    "name",
    [
        "../news", "..", "%2e%2e%2fnews", "%2e%2e", "%252e%252e%252fnews", "/news", "news/", "news%00", "%00", "",
        "%e2%80%a4%e2%80%a4/news", "%ef%bc%8e%ef%bc%8e%ef%bc%8fnews", "%c0%ae%c0%ae", "%ff", "news%0d%0aX:%20y",
        "..%5cnews", "%7bname%7d", "news;.json", "NEWS", "n" * 10_000, "%2f" * 2_000,
    ],
    ids=lambda name: name[:30] or "empty",
)  # fmt: skip
def test_a_name_is_looked_up_and_never_followed(server, path, name):
    path = path.format(name)
    body = None if path == f"/v2/models/{name}" else GOOD
    assert_refused(ask(server.url, path, body), 404, 405)


@pytest.mark.parametrize("path", [b"/\xff", "/modèles".encode(), b"/a b", b"/\x00", b"/a\r\nX: y", b"news", b"*", b""])
def test_a_path_that_is_none_is_refused(server, path):
    with Wire(server.url) as wire:
        assert_refused(wire.send(request(path, GOOD)).answer(), 400, 404)


def test_without_keys_a_key_is_no_matter(server):
    """Hugging Face's client sends the token that its user has."""
    assert ask(server.url, "/", GOOD, b"Authorization: Bearer hf_1234").status == 200


# --- JSON

DEEP = b"[" * 200_000 + b"]" * 200_000


WRONG_JSON = {
    "nothing": (b"", 400),
    "null": (b"null", 422),
    "a list": (b"[]", 422),
    "cut off": (GOOD[:-5], 400),
    "two documents": (GOOD * 2, 400),
    "deep": (DEEP, 422),
    "deep in inputs": (b'{"inputs": ' + DEEP + b"}", 422),
    "deep in a key that is not known": (b'{"x": ' + DEEP + b', "inputs": "a"}', 400),
    "deep objects": (b'{"x":' * 200_000 + b"1" + b"}" * 200_000, 400),
    "NaN": (b'{"inputs": NaN}', 400),
    "Infinity": (b'{"inputs": "a", "parameters": {"top_k": Infinity}}', 400),
    "a huge number": (b'{"inputs": "a", "parameters": {"top_k": ' + b"9" * 400 + b"}}", 422),
    "a huger number": (b'{"inputs": "a", "parameters": {"top_k": ' + b"9" * 100_000 + b"}}", 422),
    "a number beyond floats": (b'{"inputs": "a", "parameters": {"top_k": 1e999}}', 422),
    "top_k 0": (b'{"inputs": "a", "parameters": {"top_k": 0}}', 422),
    "half a surrogate pair": (rb'{"inputs": "\ud800"}', 400),
    "the other half": (rb'{"inputs": "\udc00 and more"}', 400),
    "a surrogate in UTF-8": (b'{"inputs": "\xed\xa0\x80"}', 400),
    "a surrogate as a key": (rb'{"\ud800": 1, "inputs": "a"}', 400),
    "no UTF-8": (b'{"inputs": "\xff\xfe"}', 400),
    "overlong UTF-8": (b'{"inputs": "\xc0\xaf"}', 400),
    "UTF-16": ('{"inputs": "a"}'.encode("utf-16"), 400),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, 400),
    "an unknown escape": (rb'{"inputs": "\x41"}', 400),
    "a control character": (b'{"inputs": "a\x00b"}', 400),
    "a number": (b'{"inputs": 1}', 422),
    "no texts": (b'{"inputs": []}', 422),
    "too many texts": (json.dumps({"inputs": ["a"] * 257}).encode(), 422),
    "far too many texts": (b'{"inputs": [' + b'"",' * 600_000 + b'""]}', 422),
    "too long a text": (json.dumps({"inputs": "a" * 100_001}).encode(), 413),
    "too long a pair": (json.dumps({"inputs": {"text": "a", "text_pair": "a" * 100_001}}).encode(), 413),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_JSON)
def test_json_that_is_wrong_is_refused(server, name):
    body, status = WRONG_JSON[name]
    assert_refused(ask(server.url, "/", body), status)
    if b"parameters" not in body:  # which are Hugging Face's
        assert_refused(ask(server.url, "/predict", body), 400, 413, 422)
    assert_refused(ask(server.url, INFER, body), 400)


def test_of_two_keys_the_last_one_counts(server):
    both = ask(server.url, "/", b'{"inputs": 1, "inputs": "hello", "parameters": {"top_k": 1}}')
    assert_refused(both, 422)  # either is of the type, or the request is refused
    one = ask(server.url, "/", b'{"inputs": "goodbye", "inputs": "hello", "parameters": {"top_k": 1}}')
    assert one.json == ask(server.url, "/", GOOD).json


@pytest.mark.parametrize("text", ["\0", "\u200b" * 1000, "\U0001f600", "a" * 100_000, " " * 100_000, "", "́" * 1000])
def test_odd_texts_are_texts(server, text):
    assert ask(server.url, "/", json.dumps({"inputs": text}).encode()).status == 200


def test_a_text_that_json_can_hold_but_not_show_comes_to_no_harm_in_an_error(server):
    assert_refused(ask(server.url, INFER, infer(tensor("\u2028</script>" * 100_000, shape=[2]))), 400)


# --- tensors


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": []}, {"shape": [0], "data": []}, {"shape": [-1]}, {"shape": [1.5]}, {"shape": [True]}, {"shape": "1"},
        {"shape": [2]}, {"shape": [1] * 9}, {"shape": [2**31] * 8}, {"shape": [2**63]}, {"shape": [2**80]},
        {"shape": [0, 2**31, 2**31, 2**31], "datatype": "INT64", "data": []},
        {"shape": [2**16, 2**16, 2**16, 2**16], "datatype": "INT64", "data": []},
        {"datatype": "INT64"}, {"datatype": "FP32"}, {"datatype": "BOOL"}, {"datatype": "X" * 10_000}, {"datatype": 1},
        {"data": [1]}, {"data": [None]}, {"data": [["a", "b"]]}, {"data": [{}]}, {"data": {}}, {"data": None},
        {"data": []}, {"datatype": "INT64", "data": [True]}, {"datatype": "INT64", "data": [1.5]},
        {"datatype": "FP16", "data": [1e30]}, {"datatype": "FP32", "data": [10**400]},
        {"datatype": "UINT8", "data": [-1]},
        {"datatype": "INT64", "data": [2**63]},
        {"datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3]]},
        {"datatype": "INT64", "shape": [2], "data": [1, "a"]},
        {"name": "n" * 1_000_000}, {"name": ""}, {"name": "text_pair"}, {"name": "label"}, {"name": 1},
        {"parameters": {"binary_data_size": -1}}, {"parameters": {"binary_data_size": 2**62}},
        {"parameters": {"binary_data_size": True}}, {"parameters": {"binary_data_size": "5"}},
        {"parameters": {"a": 10**400}}, {"parameters": {"a": {}}}, {"parameters": []},
    ],
    ids=lambda changes: str(changes)[:50],
)  # fmt: skip
def test_a_tensor_that_is_not_what_it_says_is_refused(server, changes):
    assert_refused(ask(server.url, INFER, infer(tensor(**changes))), 400)


def test_one_long_text_among_many_in_a_tensor_of_numbers_takes_no_memory(server):
    # numpy gives every element the room of the longest: these 220 kB would be 8 GB.
    before = memory_kb(server, "VmRSS")
    data = ["a" * 20_000, *[""] * 100_000]
    assert_refused(ask(server.url, INFER, infer(tensor(datatype="INT64", shape=[len(data)], data=data))), 400)
    assert memory_kb(server, "VmHWM") - before < MOST_GROWTH_KB


CONTRADICTIONS = {
    "one input twice": infer(tensor(), tensor()),
    "fewer texts than pairs": infer(tensor(), tensor("text_pair", shape=[2], data=["a", "b"])),
    "10,000 inputs": infer(*(tensor(f"text{i}") for i in range(10_000))),
    "10,000 outputs": infer(outputs=[{"name": "label"}] * 10_000),
    "one output twice": infer(outputs=[{"name": "label"}] * 2),
    "an output that is none": infer(outputs=[{"name": "labels"}]),
    "the best 0": infer(outputs=[{"name": "scores", "parameters": {"classification": 0}}]),
    "the best -2⁶³": infer(outputs=[{"name": "scores", "parameters": {"classification": -(2**63)}}]),
    "the best '1'": infer(outputs=[{"name": "scores", "parameters": {"classification": "1"}}]),
    "a timeout of 400 digits": infer(parameters={"timeout": 10**400}),
    "an id that is a number": infer(id=1),
    "too many rows": infer(tensor(shape=[257], data=["a"] * 257)),
    "no inputs": b'{"inputs": []}',
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_infer_request_that_contradicts_itself_is_refused(server, name):
    assert_refused(ask(server.url, INFER, CONTRADICTIONS[name]), 400)


@pytest.mark.parametrize("length", ["-1", "0", "1", "+5", "1e3", "abc", "", "²", "9" * 30, "999999", "5, 5"])
def test_a_binary_header_length_that_lies_is_refused(server, length):
    header = b"Inference-Header-Content-Length: " + length.encode("latin-1", "replace")
    assert_refused(ask(server.url, INFER, infer(), header), 400)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0", b"\5\0\0\0hell", b"\5\0\0\0hello!", b"\xff\xff\xff\xff", b"\1\0\0\0\xff", b"\0\0\0\0" * 400_000],
    ids=lambda raw: repr(raw[:10]),
)
def test_raw_texts_that_are_not_as_long_as_they_say_are_refused(server, raw):
    head = infer({"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}})
    header = b"Inference-Header-Content-Length: %d" % len(head)
    assert_refused(ask(server.url, INFER, head + raw, header), 400)


@pytest.mark.parametrize("bad", [10**6, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64])
def test_a_token_that_is_none_fails_its_own_request_and_no_other_of_its_batch(server, bad):
    good, wrong = of_ids(server, IDS), of_ids(server, [101, bad, 2001, 102])
    right = ask(server.url, INFER, good)
    assert right.status == 200
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: ask(server.url, INFER, wrong if i % 4 == 0 else good), range(64)))
    for i, answer in enumerate(found):
        if i % 4 == 0:
            assert_refused(answer, 400)
        else:
            assert answer.status == 200
            assert answer.json["outputs"][0] == right.json["outputs"][0]


@pytest.mark.parametrize("mask", [2, -1, 2**62])
def test_a_mask_that_is_none_is_refused(server, mask):
    assert_refused(ask(server.url, INFER, of_ids(server, IDS, mask)), 400)


def test_a_mask_that_hides_everything_has_an_answer_or_an_error(server):
    assert ask(server.url, INFER, of_ids(server, IDS, 0)).status in (200, 400, 500)


def test_more_tokens_than_the_model_reads_are_refused(server):
    assert_refused(ask(server.url, INFER, of_ids(server, [101] * 2000)), 400)


# --- bodies


COMPRESSED = {
    "gzip bomb": (b"gzip", gzip.compress(bytes(50_000_000)), 413),
    "deflate bomb": (b"deflate", zlib.compress(b" " * 50_000_000), 413),
    "bomb in a bomb": (b"gzip", gzip.compress(gzip.compress(bytes(50_000_000))), 400),
    "gzip, cut off": (b"gzip", gzip.compress(GOOD)[:-1], 400),
    "deflate, cut off": (b"deflate", zlib.compress(GOOD)[:10], 400),
    "gzip, wrong sum": (b"gzip", gzip.compress(GOOD)[:-8] + bytes(8), 400),
    "gzip, more behind it": (b"gzip", gzip.compress(GOOD) + gzip.compress(b" "), 400),
    "gzip, nothing": (b"gzip", b"", 400),
    "not gzip": (b"gzip", GOOD, 400),
    "brotli": (b"br", GOOD, 415),
    "twice": (b"gzip, gzip", gzip.compress(gzip.compress(GOOD)), 415),
    "an unknown one": (b"x" * 1000, GOOD, 415),
    "no ASCII": (b"\xff", GOOD, 415),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_body_is_bounded_and_whole(server, name):
    encoding, body, status = COMPRESSED[name]
    assert_refused(ask(server.url, "/", body, b"Content-Encoding: " + encoding), status)


@pytest.mark.parametrize("encoding", [b"identity", b"Identity", b""])
def test_no_encoding_may_be_said(server, encoding):
    assert ask(server.url, "/", GOOD, b"Content-Encoding: " + encoding).status == 200


def chunked(body: bytes, size: int) -> bytes:
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def post(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: localhost", *headers, b"", body])


@pytest.mark.parametrize("path", ["/", "/predict", INFER, "/nowhere"])
def test_a_body_over_the_cap_is_refused_and_a_client_that_sends_it_all_learns_why(server, path):
    with Wire(server.url) as wire:
        for _ in range(2):  # and its connection goes on
            wire.send(request(path, b"x" * 5_000_000, b"X: y"))
            assert_refused(wire.answer(), 404 if path == "/nowhere" else 413)


def test_a_body_over_the_cap_that_declares_no_length_is_cut(server):
    with Wire(server.url) as wire:
        body = chunked(b" " * 5_000_000, 50_000)
        assert_refused(wire.send(post(b"Transfer-Encoding: chunked", body=body)).answer(), 413)


def test_thousands_of_tiny_chunks_are_one_body(server):
    with Wire(server.url) as wire:
        body = chunked(b" " * 20_000 + GOOD, 1)
        assert wire.send(post(b"Transfer-Encoding: chunked", body=body)).answer().status == 200


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 500_000, b"a: " + b"b" * 3_000_000], ids=["many", "long"])
@pytest.mark.parametrize("path", ["/", "/nowhere"])
def test_trailers_are_bounded(server, path, trailers):
    before = memory_kb(server, "VmRSS")
    with Wire(server.url) as wire:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" % path.encode()
        assert_refused(wire.send(head, trailers).answer(), 431, 404)
        assert wire.answers() == []
    assert memory_kb(server, "VmRSS") - before < 20_000


def test_a_trailer_is_none_of_the_headers(server):
    with Wire(server.url) as wire:
        body = chunked(GOOD, 100)[:-2] + b"Content-Encoding: gzip\r\nInference-Header-Content-Length: 1\r\n\r\n"
        assert wire.send(post(b"Transfer-Encoding: chunked", body=body)).answer().status == 200


def test_extensions_of_a_chunk_are_bounded(server):
    with Wire(server.url) as wire:
        wire.send(post(b"Transfer-Encoding: chunked", body=b"1;"), b"a" * 3_000_000)
        assert_refused(wire.answer(), 431)
