"""Rerankers over HTTP: text-embeddings-inference's API, Cohere's, and what is refused."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
from fuzz import small
from load_client import ask
from serve_process import served

import kdexport
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.metrics import sigmoid

QUERY, TEXTS = (
    "what lifts a wing",
    ["rain", "air flows faster above it and so the pressure is lower", "a wing of a house"],
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    config = TaskConfig(task="text-ranking", labels=["value"], inputs=small.TEXT_INPUTS, max_length=64, function="none")
    return small.pack(config, tmp_path_factory.mktemp("ranks") / "ranks")


@pytest.fixture(scope="module")
def server(artifact, tmp_path_factory):
    other = small.pack(small.configs()["text"], tmp_path_factory.mktemp("other") / "other")
    with served(f"ranks={artifact}", f"other={other}") as found:
        yield found


@pytest.fixture(scope="module")
def expected(artifact):
    scores = [answer.score for answer in kdexport.load(artifact).predict([(QUERY, text) for text in TEXTS])]
    return scores, np.argsort(scores)[::-1].tolist()


def test_texts_come_back_best_first_with_sigmoids_or_raw_scores(server, expected):
    scores, order = expected
    _, found, _ = ask(f"{server.url}/rerank", {"query": QUERY, "texts": TEXTS})
    assert [one["index"] for one in found] == order
    assert [one["score"] for one in found] == pytest.approx(sigmoid(np.array(scores))[order], abs=1e-5)
    assert "text" not in found[0]
    _, found, _ = ask(f"{server.url}/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True})
    assert [(one["text"], one["score"]) for one in found] == [(TEXTS[i], pytest.approx(scores[i])) for i in order]


def test_documents_come_back_as_coheres_clients_read_them(server, expected):
    scores, order = expected
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    asked = {"model": "ranks", "query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    _, found, _ = ask(f"{server.url}/v1/rerank", asked)
    assert found["model"] == "ranks"
    assert [(one["index"], one["document"]) for one in found["results"]] == [(i, {"text": TEXTS[i]}) for i in order[:2]]
    scored = [one["relevance_score"] for one in found["results"]]
    assert scored == pytest.approx(sigmoid(np.array(scores))[order[:2]], abs=1e-5)
    _, found, _ = ask(f"{server.url}/v1/rerank", {"query": QUERY, "documents": TEXTS})
    assert [one.keys() for one in found["results"]] == [{"index", "relevance_score"}] * 3


def test_hugging_faces_api_and_predict_score_pairs(server, expected):
    scores, _ = expected
    pairs = [{"text": QUERY, "text_pair": text} for text in TEXTS]
    _, found, _ = ask(server.url, {"inputs": pairs})
    assert [one[0]["score"] for one in found] == pytest.approx(scores)
    _, found, _ = ask(f"{server.url}/predict", {"inputs": [[QUERY, text] for text in TEXTS], "raw_scores": True})
    assert [one[0]["score"] for one in found] == pytest.approx(scores)


def test_info_says_that_it_reranks(server):
    with urllib.request.urlopen(f"{server.url}/info") as response:
        assert json.load(response)["model_type"].keys() == {"reranker"}


@pytest.mark.parametrize(
    ("path", "asked", "status", "reason"),
    [
        ("/", {"inputs": "one text"}, 422, "ranks reads pairs: give each text its text_pair"),
        ("/predict", {"inputs": "one text"}, 422, "ranks reads pairs"),
        ("/rerank", {"query": QUERY, "texts": []}, 422, "texts"),
        ("/rerank", {"query": QUERY}, 422, "texts"),
        ("/rerank", {"query": QUERY, "texts": "one"}, 422, "texts"),
        ("/rerank", {"query": QUERY, "texts": ["a"] * 2000}, 422, "a request may have 1 to"),
        ("/rerank", {"query": QUERY, "texts": ["word " * 100], "truncate": False}, 422, "more than 64 tokens"),
        ("/v1/rerank", {"query": QUERY, "documents": [1]}, 422, "documents"),
        ("/v1/rerank", {"query": QUERY, "documents": ["a"], "top_n": 0}, 422, "top_n"),
        ("/v1/rerank", {"model": "other", "query": QUERY, "documents": ["a"]}, 404, "other is for text-classification"),
        ("/v1/rerank", {"model": "none", "query": QUERY, "documents": ["a"]}, 404, "no such model"),
    ],
)
def test_what_can_not_be_ranked_is_refused(server, path, asked, status, reason):
    found, answer, _ = ask(f"{server.url}{path}", asked)
    assert (found, reason in answer["error"]) == (status, True), answer
