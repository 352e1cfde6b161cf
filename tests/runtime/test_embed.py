"""Vectors from Python: prompts, dimensions, smaller numbers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from embedders import write_embedder
from fuzz import small

import kdexport as package
from kdexport.pipeline.export_model import export
from kdexport.tasks.vectors import encoded

TEXTS = ["a", "a longer text about shares", "", "the striker scored twice in the second half"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    export(write_embedder(folder / "model"), folder / "artifact", variants="fp32")
    return package.load(folder / "artifact")


def test_an_array_in_the_order_of_the_texts_is_what_predict_gives(model):
    found = model.embed(TEXTS, batch_size=2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [one.values for one in model.predict(TEXTS)], atol=1e-6)
    assert np.array_equal(model.embed(TEXTS[0]), model.embed(TEXTS[:1]))
    assert model.embed([]).shape == (0, 32)


def test_a_prompt_stands_before_each_text(model):
    prompted = [f"query: {text}" for text in TEXTS]
    np.testing.assert_allclose(model.embed(TEXTS, prompt="query"), model.embed(prompted), atol=1e-6)
    # Sentence-Transformers' name for the prompt of a document, which models call as they like.
    assert np.array_equal(model.embed(TEXTS, prompt="document"), model.embed(TEXTS, prompt="passage"))


@pytest.mark.parametrize(
    ("dtype", "kind", "width"), [("float", np.float32, 12), ("int8", np.int8, 12), ("binary", np.uint8, 2)]
)
def test_dimensions_and_numbers(model, dtype, kind, width):
    found, part = model.embed(TEXTS, dimensions=12, dtype=dtype), model.embed(TEXTS)[:, :12]
    assert (found.dtype, found.shape) == (kind, (4, width))
    assert np.array_equal(found, encoded(part / np.linalg.norm(part, axis=1, keepdims=True), dtype))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": "title"}, "the model has no prompt 'title'. Its prompts are query, passage"),
        ({"dimensions": 33}, "vectors have 32 dimensions, not 33"),
        ({"dimensions": 0}, "vectors have 32 dimensions, not 0"),
        ({"dtype": "int4"}, "the dtype 'int4' is unknown. Take one of float, int8, binary"),
        ({"texts": [("a", "pair")]}, "input 0 is a pair of texts"),
        ({"texts": [b"a"]}, "input 0 is no text but bytes"),
    ],
)
def test_what_is_refused(model, given, says):
    with pytest.raises(package.DataError) as error:
        model.embed(**{"texts": ["a"]} | given)
    assert says in str(error.value)


def test_a_classifier_embeds_nothing(tmp_path):
    classifier = package.load(small.pack(small.configs()["text"], tmp_path / "news"))
    with pytest.raises(package.DataError, match="the model is for text-classification, and makes no vectors"):
        classifier.embed(["a"])
