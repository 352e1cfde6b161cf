"""What other people's clients make of the real server: Triton's, Hugging Face's, and requests as TEI documents them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from load_client import ask
from near import apart
from serve_process import served
from tritonclient.utils import InferenceServerException

import kdexport as package
from kdexport import __version__

TEXTS = ["shares rose after the merger", "the striker scored twice", "über 5 € – a new phone", ""]


@pytest.fixture(scope="module")
def server(finished):
    with served(f"exact={finished}:fp32", f"tickets={finished}") as found:
        yield found


@pytest.fixture(scope="module")
def expected(finished):
    """What the file itself says of TEXTS, without any server."""
    return package.load(finished, "fp32").predict(TEXTS)


@pytest.fixture(scope="module")
def encoded(finished):
    """TEXTS as the graph's own tensors."""
    return package.load(finished, "fp32").task.encode([{"text": text} for text in TEXTS])


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as found:
        yield found


def texts_input(library, binary: bool = True, shape: list[int] | None = None):
    tensor = library.InferInput("text", shape or [len(TEXTS)], "BYTES")
    texts = np.array([text.encode() for text in TEXTS], dtype=np.object_).reshape(tensor.shape())
    return [tensor.set_data_from_numpy(texts, binary_data=binary)]


def tensor_inputs(library, arrays, binary: bool = True):
    return [
        library.InferInput(name, list(array.shape), "INT64").set_data_from_numpy(array, binary_data=binary)
        for name, array in arrays.items()
    ]


def outputs(library, binary: bool = True, **more):
    return [library.InferRequestedOutput(name, binary, **more) for name in ("label", "score", "scores", "logits")]


def texts_of(array) -> list[str]:
    """JSON gives str, raw tensors give bytes."""
    return [one.decode() if isinstance(one, bytes) else one for one in array.ravel()]


def check(result, expected) -> None:
    labels = list(expected[0].scores)
    assert texts_of(result.as_numpy("label")) == [answer.label for answer in expected]
    np.testing.assert_allclose(result.as_numpy("score"), [answer.score for answer in expected], atol=1e-4)
    scores = result.as_numpy("scores")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[answer.scores[label] for label in labels] for answer in expected], atol=1e-4)


# --- tritonclient


def test_triton_health_and_metadata(client, finished):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata() == {
        "name": "kdexport", "version": __version__, "extensions": ["binary_tensor_data", "classification"],
    }  # fmt: skip
    found = client.get_model_metadata("tickets")
    (version,) = found["versions"]
    assert found == client.get_model_metadata("tickets", version)
    assert found["name"] == "tickets"
    classes = len(package.load(finished).task.labels)
    assert {"name": "text", "datatype": "BYTES", "shape": [-1]} in found["inputs"]
    assert {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]} in found["inputs"]
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, classes]} in found["outputs"]
    assert client.is_model_ready("tickets")
    assert client.is_model_ready("tickets", version)
    assert not client.is_model_ready("tickets", "0")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("../../etc/passwd")  # the client sends it as it is


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_triton_infers_from_texts(client, expected, binary_in, binary_out):
    wanted = None if binary_out is None else outputs(triton, binary_out)
    for shape in ([len(TEXTS)], [len(TEXTS), 1]):
        result = client.infer("exact", texts_input(triton, binary_in, shape), outputs=wanted, request_id="it-is-7")
        check(result, expected)
        response = result.get_response()
        assert response["id"] == "it-is-7"
        assert response["model_name"] == "exact"
        # Without a list of outputs the client asks for all of them, raw.
        assert ("data" in result.get_output("label")) == (binary_out is False)


@pytest.mark.parametrize("binary_in", [True, False])
def test_triton_infers_from_the_graphs_own_tensors(client, encoded, expected, binary_in):
    theirs = client.infer("exact", tensor_inputs(triton, encoded, binary_in))
    check(theirs, expected)
    ours = client.infer("exact", texts_input(triton))
    assert apart(theirs.as_numpy("logits"), ours.as_numpy("logits")) < 1e-4


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_compresses(client, expected, algorithm):
    for binary in (True, False):
        inputs = texts_input(triton, binary)
        check(
            client.infer(
                "exact", inputs, request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
            ),
            expected,
        )


def test_triton_classifies(client, expected):
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput(name, binary, class_count=2) for name in ("scores", "logits")]
        result = client.infer("exact", texts_input(triton), outputs=wanted)
        for row, answer in zip(result.as_numpy("scores"), expected, strict=True):
            best = sorted(answer.scores, key=answer.scores.get, reverse=True)[:2]
            for one, label in zip(texts_of(row), best, strict=True):
                score, index, name = one.split(":")
                assert name == label
                assert list(answer.scores)[int(index)] == label
                assert float(score) == pytest.approx(answer.scores[label], abs=1e-4)
        assert result.as_numpy("logits").shape == (len(TEXTS), 2)


def test_triton_many_at_once(server, expected):
    url = server.url.removeprefix("http://")
    with triton.InferenceServerClient(url, concurrency=4) as client:
        waiting = [client.async_infer("exact", texts_input(triton), request_id=str(i)) for i in range(12)]
        for i, one in enumerate(waiting):
            result = one.get_result()
            assert result.get_response()["id"] == str(i)
            check(result, expected)


def wrong_inputs():
    text = texts_input(triton)
    ids = triton.InferInput("input_ids", [1, 2], "INT64").set_data_from_numpy(np.array([[5, 10**9]]))
    other = triton.InferInput("words", [1], "BYTES").set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    shape = triton.InferInput("text", [1], "BYTES").set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    return {
        "[404] there is no such model here": ("nobody", text, {}),
        "[404] exact is here in version": ("exact", text, {"model_version": "7"}),
        "[400] the inputs are `text` (and `text_pair`), or all of input_ids": ("exact", [other], {}),
        "[400] the outputs are label, score": ("exact", text, {"outputs": [triton.InferRequestedOutput("x")]}),
        "[400] input text has 1 elements; shape [3] takes 3": ("exact", [shape.set_shape([3])], {}),
        "[400] the inputs are `text` (and `text_pair`), or all of": ("exact", [ids], {}),
        "[504] the answer took longer": ("exact", text, {"timeout": 1}),
    }


@pytest.mark.parametrize(("says", "asks"), wrong_inputs().items(), ids=list(wrong_inputs()))
def test_triton_reads_what_was_wrong(client, says, asks):
    model, inputs, more = asks
    with pytest.raises(InferenceServerException) as error:
        client.infer(model, inputs, **more)
    assert str(error.value).startswith(says)


def test_triton_aio(server, encoded, expected):
    async def talk():
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("exact")
            assert not await client.is_model_ready("nobody")
            assert (await client.get_server_metadata())["name"] == "kdexport"
            (version,) = (await client.get_model_metadata("exact"))["versions"]
            for inputs in (
                texts_input(triton_aio), texts_input(triton_aio, False), tensor_inputs(triton_aio, encoded),
            ):  # fmt: skip
                for wanted in (None, outputs(triton_aio), outputs(triton_aio, False)):
                    found = await client.infer("exact", inputs, version, wanted, request_compression_algorithm="gzip")
                    check(found, expected)
            with pytest.raises(InferenceServerException, match="no such model"):
                await client.infer("nobody", texts_input(triton_aio))
            many = await asyncio.gather(*(client.infer("exact", texts_input(triton_aio)) for _ in range(12)))
            for one in many:
                check(one, expected)

    asyncio.run(talk())


# --- huggingface_hub


@pytest.fixture
def online(monkeypatch):
    """The library refuses to talk to anyone while HF_HUB_OFFLINE is set."""
    from server import forget_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    yield
    forget_sessions()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("path", ["", "/", "/models/exact"])
def test_huggingface_classifies(server, expected, path):
    client = InferenceClient(server.url + path, token="hf_unused")
    for text, answer in zip(TEXTS, expected, strict=True):
        found = client.text_classification(text)
        assert {one.label: pytest.approx(one.score, abs=1e-4) for one in found} == answer.scores
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


@pytest.mark.usefixtures("online")
def test_huggingface_parameters(server, finished, expected):
    client = InferenceClient(f"{server.url}/models/exact")
    task = package.load(finished, "fp32").task
    everything = client.text_classification(TEXTS[0], function_to_apply="none")
    logits = np.array([next(one.score for one in everything if one.label == label) for label in task.labels])
    for function in ("softmax", "sigmoid", "none"):
        found = client.text_classification(TEXTS[0], function_to_apply=function, top_k=2)
        scores = dict(zip(task.labels, task.scores(logits[np.newaxis], function)[0], strict=True))
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        assert [one.label for one in found] == best
        assert [one.score for one in found] == pytest.approx([scores[label] for label in best], abs=1e-4)
    assert [one.label for one in client.text_classification(TEXTS[1], top_k=1)] == [expected[1].label]
    assert len(client.text_classification(TEXTS[1], top_k=1000)) == len(task.labels)


@pytest.mark.usefixtures("online")
def test_huggingface_async(server, expected):
    async def talk():
        client = AsyncInferenceClient(f"{server.url}/models/exact")
        return await asyncio.gather(*(client.text_classification(text, top_k=1) for text in TEXTS))

    found = asyncio.run(talk())
    assert [one[0].label for one in found] == [answer.label for answer in expected]


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("path", "more", "code", "says"),
    [
        ("", {"top_k": 0}, 422, "Expected `float` >= 1.0 - at `$.parameters.top_k`"),
        ("", {"function_to_apply": "tanh"}, 422, "Invalid enum value 'tanh' - at `$.parameters.function_to_apply`"),
        ("/models/nobody", {}, 404, "there is no such model here"),
        ("/nowhere", {}, 404, "not found; see /openapi.json"),
    ],
)
def test_huggingface_reads_what_was_wrong(server, path, more, code, says):
    with pytest.raises(HfHubHTTPError) as error:
        InferenceClient(server.url + path).text_classification("x", **more)
    assert error.value.response.status_code == code
    assert says in str(error.value)


@pytest.mark.usefixtures("online")
def test_both_clients_read_that_there_is_too_much_work_or_no_model(finished):
    with served(f"tickets={finished}", "--max-queue", "0ms", "--threads", "1") as server:

        def huggingface(_: int) -> str:
            try:
                InferenceClient(server.url).text_classification("word " * 40)
            except HfHubHTTPError as error:
                return f"{error.response.status_code} {error.response.headers.get('retry-after')} {error}"
            return ""

        def tritons(_: int) -> str:
            with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
                try:
                    client.infer("tickets", texts_input(triton))
                except InferenceServerException as error:
                    return str(error)
            return ""

        with ThreadPoolExecutor(16) as pool:
            for client, says in ((huggingface, "429 1 "), (tritons, "[429] too much work is waiting")):
                said: set[str] = set()
                for _ in range(50):
                    said |= set(pool.map(client, range(16)))
                    if said - {""}:
                        break
                assert said - {""}
                assert all(says in one and "too much work is waiting" in one for one in said - {""})
        ask(f"{server.admin}/v2/repository/models/tickets/unload", b"")
        assert "tickets is not in service" in huggingface(0)
        assert tritons(0) == "[503] tickets is not in service"


# --- text-embeddings-inference: its own request shapes (router/src/http/types.rs), which no Python client speaks

PAIR = ["a text", "and its pair"]
CORPUS = [  # inputs, rows, whether the answer is one flat list
    ("a text", [("a text",)], True),
    (["a text"], [("a text",)], True),
    (PAIR, [tuple(PAIR)], True),
    ([["a text"]], [("a text",)], False),
    ([PAIR], [tuple(PAIR)], False),
    ([["a text"], ["another"]], [("a text",), ("another",)], False),
    ([["a text"], PAIR, [""]], [("a text",), tuple(PAIR), ("",)], False),
]


@pytest.mark.parametrize("path", ["/predict", "/invocations"])
@pytest.mark.parametrize("more", [{}, {"truncate": True, "truncation_direction": "Right"}, {"raw_scores": True}])
def test_tei_requests(server, finished, path, more):
    model = package.load(finished, "fp32")
    for inputs, rows, flat in CORPUS:
        code, found, _ = ask(server.url + path, {"inputs": inputs} | more)
        assert code == 200, found
        found = [found] if flat else found
        assert len(found) == len(rows)
        for classes, row in zip(found, rows, strict=True):
            logits = model.run(model.task.encode([dict(zip(("text", "text_pair"), row, strict=False))]))
            scores = model.task.scores(logits, "none" if more.get("raw_scores") else None)[0]
            expected = dict(zip(model.task.labels, scores, strict=True))
            assert {one["label"]: pytest.approx(one["score"], abs=1e-4) for one in classes} == expected
            assert [one["score"] for one in classes] == sorted((one["score"] for one in classes), reverse=True)


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        ({"inputs": ["a", "b", "c"]}, 422, "one text or a pair"),
        ({"inputs": [["a", "b", "c"]]}, 422, "length <= 2"),
        ({"inputs": [[]]}, 422, "length >= 1"),
        ({"inputs": []}, 422, "one text or a pair"),
        ({"inputs": ["a", ["b"]]}, 422, "a batch is a list of lists"),
        ({"inputs": 1}, 422, "$.inputs"),
        ({}, 422, "inputs"),
        ({"inputs": [["a"]] * 257}, 422, "1 to 256 texts"),
        ({"inputs": "word " * 100, "truncate": False}, 422, "tokens, and truncate is false"),
        ({"inputs": [["a"], ["word " * 100]], "truncate": False}, 422, "tokens, and truncate is false"),
        ({"inputs": "a", "truncation_direction": "Left"}, 422, "truncation_direction"),
        ({"inputs": "x" * 100_001}, 413, "100,000 characters"),
        (b"{", 400, "JSON"),
    ],
)
def test_tei_requests_that_are_wrong(server, request_, code, says):
    found, content, _ = ask(f"{server.url}/predict", request_)
    assert found == code
    assert says in content["error"]


def test_tei_info_and_sagemaker_ping(server, finished):
    task = package.load(finished).task
    code, found, _ = ask(f"{server.url}/info")
    assert code == 200
    assert found["model_id"] == "exact"
    assert found["model_type"]["classifier"]["id2label"] == {str(i): label for i, label in enumerate(task.labels)}
    assert found["max_client_batch_size"] == 256
    assert ask(f"{server.url}/ping")[0] == 200
    # A long text is within its limits when it is cut, and when it is short enough.
    for more in ({}, {"truncate": None}, {"truncate": True}):
        assert ask(f"{server.url}/invocations", {"inputs": "word " * 100} | more)[0] == 200
    assert ask(f"{server.url}/predict", {"inputs": "word", "truncate": False})[0] == 200
