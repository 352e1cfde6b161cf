"""gRPC as its clients speak it: Triton's own, against the real server."""

from __future__ import annotations

import asyncio
import gzip
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf.descriptor_pb2 import DescriptorProto
from grpc_calls import TEXTS, request
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from near import apart
from serve_process import served
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from kdexport import load
from kdexport.serve import grpc as ours

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server(finished):
    with served(f"news={finished}", "--grpc-port", 0, "--max-rows", 64) as found:
        yield found


@pytest.fixture(scope="module")
def address(server) -> str:
    return address_of(server)


@pytest.fixture(scope="module")
def stub(address) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def client(address) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as found:
        yield found


@pytest.fixture(scope="module")
def predictor(finished):
    return load(finished)


def address_of(server) -> str:
    return re.search(r"gRPC on (\S+)", "".join(server.log))[1]


def texts(values: list[str]) -> triton.InferInput:
    found = triton.InferInput("text", [len(values)], "BYTES")
    found.set_data_from_numpy(np.array(values, dtype=object))
    return found


# --- the protocol


def without_json_names(message: DescriptorProto) -> None:
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        without_json_names(nested)


def test_the_messages_are_the_protocols():
    for name, message in ours._MESSAGES.items():
        mine, theirs = DescriptorProto(), DescriptorProto()
        message.DESCRIPTOR.CopyToProto(mine)
        getattr(pb, name).DESCRIPTOR.CopyToProto(theirs)
        without_json_names(mine)
        assert mine == theirs
    theirs = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in ours._FILE.service[0].method:
        expected = theirs[method.name]
        assert method.input_type == f".{expected.input_type.full_name}"
        assert method.output_type == f".{expected.output_type.full_name}"


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("news")
    assert client.get_server_metadata().name == "kdexport"
    found = client.get_model_metadata("news")
    assert found.versions == [client.infer("news", [texts(TEXTS)]).get_response().model_version]
    assert client.is_model_ready("news", found.versions[0])
    assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs] == [
        ("text", "BYTES", [-1]),
        ("input_ids", "INT64", [-1, -1]),
        ("attention_mask", "INT64", [-1, -1]),
        ("token_type_ids", "INT64", [-1, -1]),
    ]
    assert {one.name for one in found.outputs} == {"label", "score", "scores", "logits"}


def test_answers_are_the_predictors(client, predictor):
    # One by one: int8 activations have one scale a batch, so a text's company moves its logits a little.
    alone = client.infer("news", [texts(TEXTS[:1])])
    np.testing.assert_allclose(alone.as_numpy("score"), [predictor.predict(TEXTS[:1])[0].score], atol=1e-5)
    found = client.infer("news", [texts(TEXTS)], request_id="seven")
    answers = predictor.predict(TEXTS)
    assert found.get_response().id == "seven"
    assert found.get_response().raw_output_contents
    assert found.as_numpy("label").tolist() == [answer.label.encode() for answer in answers]
    np.testing.assert_allclose(found.as_numpy("score"), [answer.score for answer in answers], atol=0.01)
    np.testing.assert_allclose(found.as_numpy("scores").sum(axis=1), 1, atol=1e-5)
    assert found.as_numpy("logits").shape == (3, 5)


def test_contents_are_answered_with_contents(stub, client):
    raw = client.infer("news", [texts(TEXTS)])
    found = stub.ModelInfer(request(TEXTS))
    assert not found.raw_output_contents
    by_name = {output.name: output for output in found.outputs}
    assert list(by_name["label"].contents.bytes_contents) == raw.as_numpy("label").tolist()
    np.testing.assert_array_equal(by_name["logits"].contents.fp32_contents, raw.as_numpy("logits").ravel())
    assert list(by_name["logits"].shape) == [3, 5]


def test_outputs_and_classes_that_are_asked_for(client):
    wanted = [triton.InferRequestedOutput("scores", class_count=2), triton.InferRequestedOutput("label")]
    found = client.infer("news", [texts(TEXTS)], outputs=wanted)
    assert [output.name for output in found.get_response().outputs] == ["scores", "label"]
    best = found.as_numpy("scores")
    assert best.shape == (3, 2)
    assert best[0][0].split(b":")[2] == found.as_numpy("label")[0]


def test_pairs(client):
    pair = triton.InferInput("text_pair", [1], "BYTES")
    pair.set_data_from_numpy(np.array(["and the second half"], dtype=object))
    assert client.infer("news", [texts(["The first half"]), pair]).as_numpy("label").shape == (1,)


def test_encoded_tensors_raw_and_as_contents(client, stub, predictor):
    arrays = predictor.task.collate(predictor.task.tokenize([{"text": TEXTS[0]}]))
    wanted = client.infer("news", [texts(TEXTS[:1])]).as_numpy("logits")
    raw = []
    message = pb.ModelInferRequest(model_name="news")
    for name, array in arrays.items():
        raw.append(triton.InferInput(name, list(array.shape), "INT64"))
        raw[-1].set_data_from_numpy(array.astype(np.int64))
        tensor = message.inputs.add(name=name, datatype="INT64", shape=array.shape)
        tensor.contents.int64_contents.extend(array.ravel().tolist())
    assert apart(client.infer("news", raw).as_numpy("logits"), wanted) < 1e-5
    found = {output.name: output for output in stub.ModelInfer(message).outputs}
    assert apart(found["logits"].contents.fp32_contents, wanted.ravel()) < 1e-5


def test_many_at_once(address):
    async def main() -> None:
        import tritonclient.grpc.aio as aio

        async with aio.InferenceServerClient(address) as client:
            alone = [(await client.infer("news", [texts([text])])).as_numpy("logits") for text in TEXTS]
            found = await asyncio.gather(*(client.infer("news", [texts([TEXTS[i % 3]])]) for i in range(150)))
            for i, one in enumerate(found):
                assert apart(one.as_numpy("logits"), alone[i % 3]) < 0.05  # int8 in other batches

    asyncio.run(main())


# --- what goes wrong


def change(**changes: object):
    def changed() -> pb.ModelInferRequest:
        found = request(TEXTS[:1])
        for name, value in changes.items():
            setattr(found if hasattr(found, name) else found.inputs[0], name, value)
        return found

    return changed


def edited(edit):
    def changed() -> pb.ModelInferRequest:
        found = request(TEXTS[:1])
        edit(found)
        return found

    return changed


def raw(message: pb.ModelInferRequest, datatype: str, shape: list[int], data: bytes) -> None:
    del message.inputs[:]
    message.inputs.add(name="text", datatype=datatype, shape=shape)
    message.raw_input_contents.append(data)


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        (change(model_name="../x"), Code.NOT_FOUND, "no such model"),
        (change(model_name=""), Code.NOT_FOUND, "no such model"),
        (change(model_version="9"), Code.NOT_FOUND, "in version"),
        (change(name="words"), Code.INVALID_ARGUMENT, "the inputs are `text`"),
        (change(datatype="TEXT"), Code.INVALID_ARGUMENT, "comes raw only"),
        (change(datatype="FP16"), Code.INVALID_ARGUMENT, "comes raw only"),
        (change(datatype="INT64"), Code.INVALID_ARGUMENT, "must be in int64_contents"),
        (edited(lambda m: m.inputs[0].shape.append(2)), Code.INVALID_ARGUMENT, "has 1 elements"),
        (edited(lambda m: m.inputs[0].ClearField("shape")), Code.INVALID_ARGUMENT, "can't be read"),
        (edited(lambda m: m.inputs[0].shape.__setitem__(0, -1)), Code.INVALID_ARGUMENT, "can't be read"),
        (edited(lambda m: m.inputs[0].contents.Clear()), Code.INVALID_ARGUMENT, "has 0 elements"),
        (edited(lambda m: m.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff")), Code.INVALID_ARGUMENT, "UTF-8"),
        (edited(lambda m: m.inputs[0].contents.int_contents.append(1)), Code.INVALID_ARGUMENT, "must be in bytes_"),
        (edited(lambda m: m.inputs.append(m.inputs[0])), Code.INVALID_ARGUMENT, "same name"),
        (edited(lambda m: m.ClearField("inputs")), Code.INVALID_ARGUMENT, "can't be read"),
        (edited(lambda m: m.raw_input_contents.append(b"\0")), Code.INVALID_ARGUMENT, "not as both"),
        (edited(lambda m: m.raw_input_contents.extend([b"", b""])), Code.INVALID_ARGUMENT, "as many raw_input"),
        (edited(lambda m: m.outputs.add(name="words")), Code.INVALID_ARGUMENT, "the outputs are"),
        (edited(lambda m: raw(m, "BYTES", [1], b"\x05\0\0\0ab")), Code.INVALID_ARGUMENT, "beyond its end"),
        (edited(lambda m: raw(m, "FP16", [1], b"\0\0")), Code.INVALID_ARGUMENT, "BYTES"),
        (edited(lambda m: raw(m, "FP16", [2**31] * 8, b"\0\0")), Code.INVALID_ARGUMENT, "has 2 bytes"),
        (lambda: request(["a"] * 65), Code.INVALID_ARGUMENT, "1 to 64 texts"),
        (lambda: request(["a" * 100_001]), Code.INVALID_ARGUMENT, "100,000 characters"),
        (lambda: request(["a" * 3_000_000]), Code.RESOURCE_EXHAUSTED, "larger than max"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_faults_of_a_request(stub, message, code, says):
    with pytest.raises(grpc.RpcError) as found:
        stub.ModelInfer(message())
    assert found.value.code() == code
    assert says in found.value.details()


def test_bytes_that_are_no_message(address):
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as found:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff\xff")
        assert (found.value.code(), found.value.details()) == (Code.INVALID_ARGUMENT, "the message can't be read")
        with pytest.raises(grpc.RpcError) as found:
            channel.unary_unary("/inference.GRPCInferenceService/ModelTrain")(b"")
        assert found.value.code() == Code.UNIMPLEMENTED


def test_a_compressed_message_is_bounded_by_what_it_holds(address):
    bomb = request(["a" * 50_000_000]).SerializeToString()
    assert len(gzip.compress(bomb)) < 100_000
    with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        assert GRPCInferenceServiceStub(channel).ModelInfer(request(TEXTS)).outputs
        with pytest.raises(grpc.RpcError) as found:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(bomb)
    assert found.value.code() == Code.RESOURCE_EXHAUSTED


PARAMETERS = st.dictionaries(
    st.sampled_from(["timeout", "binary_data_size", "binary_data", "classification", "x"]),
    st.one_of(
        st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
        st.builds(pb.InferParameter, double_param=st.floats()),
        st.builds(pb.InferParameter, string_param=st.text(max_size=5)),
        st.builds(pb.InferParameter, bool_param=st.booleans()),
        st.builds(pb.InferParameter),
    ),
    max_size=2,
)
TENSORS = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["text", "text_pair", "input_ids", "attention_mask", "token_type_ids", "x"]),
    datatype=st.sampled_from(["BYTES", "INT64", "FP16", "FP64", "BOOL", "UINT8", ""]),
    shape=st.lists(st.sampled_from([-1, 0, 1, 1, 2, 2**40]), max_size=3),
    parameters=PARAMETERS,
    contents=st.builds(
        pb.InferTensorContents,
        bytes_contents=st.lists(st.binary(max_size=4), max_size=2),
        int64_contents=st.lists(st.integers(-2, 40_000), max_size=2),
        fp64_contents=st.lists(st.floats(), max_size=1),
    ),
)
REQUESTS = st.builds(
    pb.ModelInferRequest,
    model_name=st.just("news"),
    parameters=PARAMETERS,
    inputs=st.lists(TENSORS, max_size=3),
    outputs=st.lists(
        st.builds(
            pb.ModelInferRequest.InferRequestedOutputTensor,
            name=st.sampled_from(["label", "scores", "logits", "x"]),
            parameters=PARAMETERS,
        ),
        max_size=2,
    ),
    raw_input_contents=st.lists(st.binary(max_size=12), max_size=2),
)


@given(message=REQUESTS)
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_message_is_the_servers_fault(stub, message):
    found = stub.ModelInfer.future(message)
    assert found.code() in (Code.OK, Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED), found.details()


# --- the process


def test_metrics(server, stub):
    def count() -> float:
        with urllib.request.urlopen(f"{server.admin}/metrics") as response:
            text = response.read().decode()
        found = re.search(r'kdexport_requests_total{code="200",model="news",protocol="grpc"} (\S+)', text)
        return float(found[1]) if found else 0.0

    before = count()
    stub.ModelInfer(request(TEXTS))
    assert count() == before + 1


def test_a_stopped_server_answers_what_it_has_taken_in(finished):
    answers, begun = [], threading.Event()
    with served(f"news={finished}", "--grpc-port", 0) as server:
        with grpc.insecure_channel(address_of(server)) as channel:
            stub = GRPCInferenceServiceStub(channel)
            stub.ModelInfer(request(TEXTS))

            def ask() -> None:
                while True:
                    try:
                        answers.append(len(stub.ModelInfer(request(TEXTS * 20)).outputs))
                    except grpc.RpcError as error:
                        answers.append(error.code())
                        return
                    begun.set()

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            begun.wait()
            server.process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
    assert set(answers) == {4, Code.UNAVAILABLE}
    assert answers.count(Code.UNAVAILABLE) == 8


def test_a_taken_port_is_one_line(finished, kdexport):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = kdexport("serve", finished, "--port", 0, "--admin-port", 0, "--grpc-port", port)
    assert found.returncode == 2
    assert f"127.0.0.1:{port} can't be listened on" in found.stderr
    assert "--grpc-port" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
def test_without_the_extra_one_line_says_which(missing):
    probe = f"import sys; sys.modules[{missing!r}] = None; import kdexport.serve.grpc"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "pip install 'kdexport[grpc]'" in found.stderr.splitlines()[-1]


def test_nothing_of_grpc_is_loaded_without_it():
    probe = "import sys, kdexport.serve.server; print({'grpc', 'google.protobuf'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
