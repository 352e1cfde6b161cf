"""Words to tag, over HTTP: a text is split as elsewhere, and words may be given as they are."""

from __future__ import annotations

import pytest
from fuzz import small
from load_client import ask
from serve_process import served

import kdexport

WORDS = ["St.-Denis", "(", "Paris", "राम"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.pack(small.configs()["tags"], tmp_path_factory.mktemp("small") / "tags")


@pytest.fixture(scope="module")
def server(model):
    with served(f"tags={model}", "--max-chars", "40", "--max-rows", "3") as found:
        yield found


def post(server, path, content):
    return ask(f"{server.url}{path}", content)[:2]


@pytest.mark.parametrize("path", ["/", "/models/tags"])
def test_words_of_a_list_are_taken_as_they_are(model, server, path):
    (expected,) = kdexport.load(model).predict([WORDS])
    everything = {"aggregation_strategy": "none", "ignore_labels": []}
    status, (found, text) = post(server, path, {"inputs": [WORDS, "राम (Paris"], "parameters": everything})
    assert status == 200
    assert [one["word"] for one in found] == WORDS
    assert [one["entity"] for one in found] == expected.tags
    joined = " ".join(WORDS)
    assert [joined[one["start"] : one["end"]] for one in found] == WORDS
    assert [one["word"] for one in text] == ["राम", "(", "Paris"]


def test_the_open_inference_protocol_takes_words_between_spaces(model, server):
    (expected,) = kdexport.load(model).predict([WORDS])
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [" ".join(WORDS)]}
    asked = {"inputs": [tensor], "outputs": [{"name": "label"}]}
    status, found = post(server, "/v2/models/tags/infer", asked | {"parameters": {"is_split_into_words": True}})
    assert (status, found["outputs"][0]["data"]) == (200, [" ".join(expected.tags)])
    split = post(server, "/v2/models/tags/infer", asked)[1]["outputs"][0]["data"][0]
    assert len(split.split()) > len(WORDS)


@pytest.mark.parametrize(
    ("inputs", "status", "says"),
    [
        ([["a", "b c"]], 422, "the word 'b c' is empty or has a space in it"),
        ([["a", ""]], 422, "the word '' is empty"),
        ([["a" * 30, "b" * 10]], 413, "a text may have 40 characters"),
        ([["a"]] * 4, 422, "a request may have 1 to 3 texts; it has 4"),
        ([["a", 1]], 422, "Expected `str`, got `int`"),
        ([[["a"]]], 422, "Expected `str`, got `array`"),
    ],
)
def test_words_have_the_limits_of_texts(server, inputs, status, says):
    found = post(server, "/", {"inputs": inputs})
    assert found[0] == status
    assert says in found[1]["error"]


def test_a_word_with_a_space_is_refused_in_the_other_protocol_too(server):
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a  b"]}
    asked = {"inputs": [tensor], "parameters": {"is_split_into_words": True}}
    status, found = post(server, "/v2/models/tags/infer", asked)
    assert (status, "the word '' is empty" in found["error"]) == (400, True)


def test_the_api_is_documented(server):
    found = ask(f"{server.url}/openapi.json")[1]
    body = found["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/TagRequest"}
    assert body["examples"]["2"]["value"] == {"inputs": [["Ada", "lives", "in", "York", "."]]}
    assert post(server, "/", body["examples"]["2"]["value"])[0] == 200
