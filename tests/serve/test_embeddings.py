"""Vectors behind the server: clients of OpenAI, Hugging Face and Triton, and requests as TEI documents them."""

from __future__ import annotations

import base64
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from embedders import write_embedder
from fuzz import small
from huggingface_hub import InferenceClient, constants
from load_client import ask
from near import apart
from serve_process import served
from server import forget_sessions

import kdexport as package
from kdexport.pipeline.export_model import export
from kdexport.tasks.vectors import encoded, shortened, unit

TEXTS = ["shares rose after the merger", "the striker scored twice", "über 5 € – a new phone 📉", "a " * 200]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    export(write_embedder(folder / "model"), folder / "artifact", variants="fp32")
    return folder / "artifact"


@pytest.fixture(scope="module")
def server(artifact):
    with served(f"vectors={artifact}", "--grpc-port", "0") as found:
        yield found
        assert not any('"code":500' in line or "Traceback" in line for line in found.log)


@pytest.fixture(scope="module")
def model(artifact):
    return package.load(artifact)


@pytest.fixture(scope="module")
def expected(model):
    """What the file itself says of TEXTS, without any server."""
    return model.embed(TEXTS)


def post(server, path, content):
    code, found, _ = ask(server.url + path, content)
    assert code == 200, found
    return found


# --- openai


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=6) as found:
        yield found


@pytest.mark.parametrize("more", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openais_client_gets_the_vectors_in_order(client, model, expected, more):
    found = client.embeddings.create(model="vectors", input=TEXTS, **more)
    vectors = [one.embedding for one in found.data]
    if more.get("encoding_format") == "base64":
        vectors = [np.frombuffer(base64.b64decode(one), "<f4") for one in vectors]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert [one.index for one in found.data] == list(range(len(TEXTS)))
    tokens = sum(model.task.sizes(model.task.tokenize([{"text": text} for text in TEXTS])))
    assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == ("vectors", tokens, tokens)


def test_openais_client_shortens_vectors_and_names_a_prompt(client, model, expected):
    (found,) = client.embeddings.create(model="vectors", input=TEXTS[0], dimensions=8).data
    np.testing.assert_allclose(found.embedding, shortened(expected, 8)[0], atol=1e-6)
    (found,) = client.embeddings.create(model="vectors", input=TEXTS[0], extra_body={"prompt_name": "query"}).data
    np.testing.assert_allclose(found.embedding, model.embed(f"query: {TEXTS[0]}")[0], atol=1e-6)


def test_token_ids_are_the_tokenizers_whole_ones(client, model, expected):
    ids = [one["input_ids"].tolist() for one in model.task.tokenize([{"text": text} for text in TEXTS])]
    found = client.embeddings.create(model="vectors", input=ids)
    np.testing.assert_allclose([one.embedding for one in found.data], expected, atol=1e-6)
    (alone,) = client.embeddings.create(model="vectors", input=ids[0]).data
    np.testing.assert_allclose(alone.embedding, expected[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_smaller_numbers_come_as_lists(client, model, expected, dtype):
    ask_for = {"model": "vectors", "input": TEXTS, "extra_body": {"embedding_dtype": dtype}}
    found = client.embeddings.create(encoding_format="float", **ask_for)
    theirs = np.array([one.embedding for one in found.data])
    assert np.abs(theirs - encoded(expected, dtype).astype(float)).max() <= (1 if dtype == "int8" else 0)
    # The client asks for base64 by itself, and would read float32 out of it.
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.embeddings.create(**ask_for)
    assert "ask for encoding_format float" in error.value.response.text


def test_many_texts_become_several_batches(client, model, server):
    texts = [f"text number {i}. " * (i % 20 + 1) for i in range(100)]
    found = client.embeddings.create(model="vectors", input=texts)
    assert apart([one.embedding for one in found.data], model.embed(texts)) < 1e-5
    assert [one.id for one in client.models.list()] == ["vectors"]


# --- huggingface_hub


@pytest.fixture
def online(monkeypatch):
    """The library refuses to talk to anyone while HF_HUB_OFFLINE is set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    yield
    forget_sessions()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("path", ["", "/models/vectors", "/embed"])
def test_huggingfaces_client_extracts_features(server, model, expected, path):
    client = InferenceClient(server.url + path, token="hf_unused")
    assert client.feature_extraction(TEXTS[0]).shape == (1, 32)
    np.testing.assert_allclose(client.feature_extraction(TEXTS), expected, atol=1e-6)
    how = {"normalize": True, "prompt_name": "passage", "truncate": True, "truncation_direction": "right"}
    np.testing.assert_allclose(
        client.feature_extraction(TEXTS[:1], dimensions=4, **how),
        model.embed(TEXTS[:1], prompt="passage", dimensions=4),
        atol=1e-6,
    )


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("path", ["/", "/models/vectors", "/similarity"])
def test_huggingfaces_client_compares_sentences(server, expected, path):
    found = InferenceClient(server.url + path).sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    np.testing.assert_allclose(found, expected @ expected[0], atol=1e-5)


# --- tritonclient


def text_input(library, texts):
    array = np.array([text.encode() for text in texts], dtype=np.object_)
    return library.InferInput("text", [len(texts)], "BYTES").set_data_from_numpy(array)


@pytest.mark.parametrize("library", [triton, triton_grpc], ids=["http", "grpc"])
def test_tritons_clients_get_vectors(server, model, expected, library):
    url = server.url if library is triton else re.search(r"gRPC on (\S+)", "".join(server.log))[1]
    with library.InferenceServerClient(url.removeprefix("http://")) as client:
        named = client.get_model_metadata("vectors")
        outputs = (
            named["outputs"] if library is triton else [{"name": o.name, "shape": [*o.shape]} for o in named.outputs]
        )
        assert [(one["name"], [int(size) for size in one["shape"]]) for one in outputs] == [
            ("sentence_embedding", [-1, 32])
        ]
        found = client.infer("vectors", [text_input(library, TEXTS)]).as_numpy("sentence_embedding")
        np.testing.assert_allclose(found, expected, atol=1e-6)
        arrays = model.task.encode([{"text": text} for text in TEXTS])
        tensors = [
            library.InferInput(name, [*array.shape], "INT64").set_data_from_numpy(array)
            for name, array in arrays.items()
        ]
        found = client.infer("vectors", tensors).as_numpy("sentence_embedding")
        np.testing.assert_allclose(found, expected, atol=1e-5)
        found = client.infer("vectors", [text_input(library, TEXTS)], parameters={"prompt_name": "query"})
        np.testing.assert_allclose(found.as_numpy("sentence_embedding"), model.embed(TEXTS, prompt="query"), atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "parameters", "outputs", "says"),
    [
        (["text"], {"prompt_name": "title"}, [], "no prompt 'title'. Its prompts are query, passage"),
        (["text", "text_pair"], {}, [], "a vector is of one text"),
        (["text"], {}, [{"name": "label"}], "the output is sentence_embedding"),
        (["text"], {}, [{"name": "sentence_embedding", "parameters": {"classification": 2}}], "a vector has none"),
    ],
)
def test_the_protocols_answer_to_what_a_vector_has_not(server, inputs, parameters, outputs, says):
    tensors = [{"name": name, "shape": [1], "datatype": "BYTES", "data": ["a"]} for name in inputs]
    content = {"inputs": tensors, "parameters": parameters, "outputs": outputs}
    code, found, _ = ask(f"{server.url}/v2/models/vectors/infer", content)
    assert code == 400
    assert says in found["error"]


# --- text-embeddings-inference


def test_tei_nests_the_vector_of_a_single_text_too(server, model, expected):
    for path in ("/embed", "/", "/models/vectors", "/invocations"):
        np.testing.assert_allclose(post(server, path, {"inputs": TEXTS[0]}), expected[:1], atol=1e-6)
    ids = model.task.encode([{"text": TEXTS[1]}])["input_ids"][0].tolist()
    np.testing.assert_allclose(post(server, "/embed", {"inputs": [TEXTS[0], ids]}), expected[:2], atol=1e-6)


def test_numbers_are_float32s_own(server, model, expected):
    """JSON that names each float32, without the digits that only a float64 has."""
    request = urllib.request.Request(f"{server.url}/embed", b'{"inputs": "shares rose", "normalize": false}')
    with urllib.request.urlopen(request) as response:
        body = response.read()
    found = np.array(json.loads(body), dtype=np.float32)
    assert np.array_equal(found, model.run(model.task.encode([{"text": "shares rose"}])))
    assert len(body) < 15 * found.size


def test_tei_gives_a_vector_of_each_token_without_padding(server, model):
    found = post(server, "/embed_all", {"inputs": TEXTS[:2]})
    for text, vectors in zip(TEXTS, found, strict=False):
        arrays = model.task.encode([{"text": text}])
        assert apart(vectors, model.states(arrays)[0]) < 1e-4


def test_tei_compares_a_sentence_with_others(server, model):
    asked = {"inputs": {"source_sentence": "a", "sentences": ["b", "a"]}, "parameters": {"prompt_name": "query"}}
    a, b = model.embed(["a", "b"], prompt="query")
    np.testing.assert_allclose(post(server, "/similarity", asked), [a @ b, 1.0], atol=1e-6)


def test_tei_info(server):
    found = post(server, "/info", None)
    assert found["model_type"] == {"embedding": {"dimensions": 32, "prompts": ["query", "passage"]}}
    assert (found["max_input_length"], found["max_client_batch_size"]) == (64, 256)


SIMILAR = {"source_sentence": "a", "sentences": ["b"]}


@pytest.mark.parametrize(
    ("path", "content", "code", "says"),
    [
        ("/embed", {"inputs": ""}, 422, "a text is empty"),
        ("/embed", {"inputs": ["a", ""]}, 422, "a text is empty"),
        ("/embed", {"inputs": [[]]}, 422, "a text is empty"),
        ("/embed", {"inputs": []}, 422, "1 to 256 texts; it has 0"),
        ("/embed", {"inputs": ["a"] * 10_000}, 422, "1 to 256 texts; it has 10000"),
        ("/embed", {"inputs": [["a", "b"]]}, 422, "Expected `float`, got `str` - at `$.inputs[0][0]`"),
        ("/embed", {"inputs": {"text": "a", "text_pair": "b"}}, 422, "$.inputs"),
        ("/embed", {"inputs": "a", "dimensions": 33}, 422, "have 32 dimensions, not 33. Ask for fewer"),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "$.dimensions"),
        ("/embed", {"inputs": "a", "prompt_name": "title"}, 422, "no prompt 'title'. Its prompts are query, passage"),
        ("/embed", {"inputs": [[101, 102]], "prompt_name": "query"}, 422, "token ids have no prompt"),
        ("/embed", {"inputs": [101, 30522]}, 422, "Give those from 0 to 30521"),
        ("/embed", {"inputs": [-1]}, 422, "Give those from 0 to 30521"),
        ("/embed", {"inputs": [101] * 65}, 422, "a text has 65 token ids. Give 1 to 64"),
        ("/embed", {"inputs": [101, "a"]}, 422, "token ids of several texts are a list of lists"),
        ("/embed", {"inputs": "word " * 100, "truncate": False}, 422, "more than 64 tokens, and truncate is false"),
        ("/embed", {"inputs": "x" * 100_001}, 413, "100,000 characters"),
        ("/embed", b"{", 400, "JSON"),
        ("/similarity", {"inputs": "a"}, 422, "$.inputs"),
        ("/similarity", {"inputs": SIMILAR | {"sentences": []}}, 422, "there is no sentence to compare with"),
        ("/similarity", {"inputs": SIMILAR | {"sentences": [""]}}, 422, "a text is empty"),
        ("/predict", {"inputs": "a"}, 404, "POST / answers for it"),
        ("/v1/embeddings", {"model": "nobody", "input": "a"}, 404, "there is no such model here"),
        ("/v1/embeddings", {"model": "vectors", "input": ""}, 422, "a text is empty"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "dimension": 4}, 422, "dimension"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "encoding_format": "hex"}, 422, "encoding_format"),
        ("/v1/completions", {"model": "vectors", "prompt": "a"}, 404, "writes nothing"),
    ],
)
def test_requests_that_are_wrong(server, path, content, code, says):
    found, answer, _ = ask(server.url + path, content)
    assert (found, says in answer["error"]) == (code, True), answer


def test_other_models_steps_are_kept_and_what_is_no_number_fails_alone(tmp_path):
    """Vectors that are not normalised, narrower than the states of tokens; and one text whose vector has no numbers."""
    written = write_embedder(tmp_path / "model", normalize=False, dense=12, fails_at="bomb")
    export(written, tmp_path / "artifact", variants="fp32")
    expected = package.load(tmp_path / "artifact").embed(["a text"])
    with served(tmp_path / "artifact") as server:
        found = post(server, "/embed", {"inputs": "a text", "normalize": False})
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(post(server, "/embed", {"inputs": "a text"}), unit(expected), atol=1e-6)
        assert np.shape(post(server, "/embed_all", {"inputs": "a text"})) == (1, 4, 32)
        for path in ("/embed", "/embed_all"):
            code, answer, _ = ask(server.url + path, {"inputs": ["a text", "bomb"]})
            assert (code, answer["error"]) == (500, "the model's answer is not a finite number")
        with ThreadPoolExecutor(4) as pool:
            many = pool.map(lambda text: ask(f"{server.url}/embed", {"inputs": text})[0], ["a text", "bomb"] * 8)
        assert list(many) == [200, 500] * 8


def test_a_classifier_makes_no_vectors(tmp_path):
    with served(f"news={small.pack(small.configs()['text'], tmp_path / 'news')}") as server:
        for path in ("/embed", "/embed_all", "/similarity", "/v1/embeddings"):
            given = {"input": "a"} if path.startswith("/v1") else {"inputs": SIMILAR if "sim" in path else "a"}
            code, found, _ = ask(server.url + path, given)
            assert (code, found["error"]) == (404, "news is for text-classification, and makes no vectors")
        assert ask(f"{server.url}/v1/models")[1]["data"] == []
