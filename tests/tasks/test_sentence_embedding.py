"""The task of sentence embeddings: rows of pairs, of searches and of plain texts; metrics against scipy and by hand."""

import json
import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from kdexport.data import demo
from kdexport.errors import ArtifactError, DataError
from kdexport.tasks import task_class
from kdexport.tasks.config import EmbeddingConfig, TaskConfig
from kdexport.tasks.judgements import judgement
from kdexport.tasks.judging import metric, metric_interval
from kdexport.tasks.rankings import mrr, ndcg, recall
from kdexport.tasks.sentence_embedding import Similarity
from kdexport.tasks.vectors import cosines, unit

NAME = "sentence-embedding"


def loaded(tmp_path, problem="", prompts=None, default=None, width=8):
    from tokenizers import Tokenizer

    Tokenizer.from_file(str(demo.teacher() / "tokenizer.json")).save(str(tmp_path / "tokenizer.json"))
    own = EmbeddingConfig(width=width, problem=problem, prompts=prompts or {}, default_prompt=default)
    config = TaskConfig(
        task=NAME, labels=[], inputs=["input_ids", "attention_mask"], max_length=16, function="none", embedding=own
    )
    return task_class(NAME).of(config)(config, Tokenizer.from_file(str(tmp_path / "tokenizer.json")))


def pairs_of(scores):
    """Both rows of each pair, as the data stage has them."""
    rows = []
    for i, score in enumerate(scores):
        row = Similarity.canonical({"text": f"first {i}", "text_pair": f"second {i}", "label": score})
        rows += Similarity.parts(row, f"pairs.csv:{i + 1}")
    return rows


def vectors(rows, seed=0, width=8):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


# --- rows


def test_a_pair_becomes_two_rows_that_belong_to_one_split():
    rows = pairs_of([2.5, "4"])
    assert [row["id"] for row in rows] == ["pairs.csv:1.1", "pairs.csv:1.2", "pairs.csv:2.1", "pairs.csv:2.2"]
    assert [row["text"] for row in rows] == ["first 0", "second 0", "first 1", "second 1"]
    assert [Similarity.unit(row) for row in rows] == ["pairs.csv:1"] * 2 + ["pairs.csv:2"] * 2
    assert [judgement(row["label"]).score for row in rows] == [2.5, 2.5, 4.0, 4.0]


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("good", "score 'good' is no number"),
        (5.5, "score 5.5 is not between 0 and 5"),
        (-0.1, "score -0.1 is not between 0 and 5"),
        ("nan", "score nan is not between 0 and 5"),
        ([1], r"score [1] is no number"),
    ],
)
def test_a_score_is_a_number_from_0_to_5(label, what):
    assert Similarity.canonical({"text": "a", "text_pair": "b", "label": label}) == what


def test_where_no_score_judges_labels_are_left_alone():
    base = task_class(NAME)
    row = {"text": "a", "text_pair": "b", "label": "entailment"}
    assert base.canonical(row)["label"] is None
    assert Similarity.canonical({"text": "a", "label": "sports"})["label"] is None
    assert base.signs([row]) == Similarity.signs([row]) == ""
    assert Similarity.signs([row | {"label": "3.8"}]) == "there are pairs with scores"


def test_a_document_belongs_to_every_split_and_a_query_to_one():
    retrieval = task_class(NAME, "retrieval")
    document = retrieval.canonical({"text": "a wing", "label": {"document": "7"}})
    query = retrieval.canonical({"text": "a wing", "label": {"gains": {"7": 2}}})
    assert (document["prompt"], query["prompt"]) == ("document", "query")
    assert retrieval.shared(document)
    assert not retrieval.shared(query)
    assert retrieval.content(document) != retrieval.content(query)  # the same text behind another prompt
    assert judgement(query["label"]).gains == {"7": 2.0}


@pytest.mark.parametrize(
    ("problem", "labels", "why"),
    [
        ("similarity", [None, None], "it holds no pair of texts with a score"),
        ("retrieval", [{"gains": {"1": 1}}], "it holds no document"),
        ("retrieval", [{"document": "1"}], "it holds no query with a relevant document"),
        ("retrieval", [{"document": "1"}, {"gains": {"1": 0}}], "it holds no query with a relevant document"),
        ("retrieval", [{"document": "1"}, {"gains": {"1": 1}}], ""),
    ],
)
def test_rows_that_can_not_judge_say_why(problem, labels, why):
    kind = task_class(NAME, problem)
    assert kind.misfit([kind.canonical({"text": "a", "label": label}) for label in labels]) == why


def test_equal_scores_judge_nothing():
    assert Similarity.misfit(pairs_of([2, 2.0, "2"])) == "all its pairs have the same score"
    assert Similarity.misfit(pairs_of([2, 3])) == ""


def test_predict_takes_single_texts(tmp_path):
    task = loaded(tmp_path)
    assert task.row("one text") == {"text": "one text"}
    with pytest.raises(DataError, match="it is a pair of texts"):
        task.row(("one", "two"))
    with pytest.raises(DataError, match="it is no text but int"):
        task.row(3)


def test_a_prompt_stands_before_the_text_that_names_it(tmp_path):
    task = loaded(tmp_path, prompts={"query": "find: ", "passage": "text: "}, default="query")
    assert task.prompted({"text": "wings"}) == "find: wings"
    assert task.prompted({"text": "wings", "prompt": "document"}) == "text: wings"
    plain = loaded(tmp_path)
    (ours,) = task.tokenize([{"text": "wings", "prompt": "document"}])
    (theirs,) = plain.tokenize([{"text": "text: wings"}])
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()


def test_a_folder_without_settings_of_vectors_is_refused(tmp_path):
    task = loaded(tmp_path)
    config = {"task": NAME, "labels": [], "inputs": ["input_ids"], "max_length": 16, "function": "none"}
    (tmp_path / "task.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="lacks the settings of its vectors"):
        type(task).load(tmp_path)


# --- metrics


def test_the_metric_of_pairs_is_scipys_spearman(tmp_path):
    scores = np.random.default_rng(1).integers(0, 11, 40) / 2  # many ties
    task, rows, found = loaded(tmp_path, "similarity"), pairs_of(scores), vectors(80)
    cosine = cosines(found[::2], found[1::2])
    assert metric(task, found, rows) == pytest.approx(spearmanr(cosine, scores).statistic, abs=1e-9)
    assert task.further(found, rows)["Pearson correlation"] == pytest.approx(pearsonr(cosine, scores).statistic)
    value, (low, high) = metric_interval(task, found, rows)
    assert low < value < high


@pytest.mark.parametrize("problem", ["similarity", "retrieval", "retrieval-mrr", "retrieval-recall"])
def test_the_order_of_rows_changes_nothing(tmp_path, problem):
    task = loaded(tmp_path, problem)
    if problem == "similarity":
        rows = pairs_of([0, 1.5, 2, 4, 4.5, 5])
    else:
        labels = [{"document": str(i)} for i in range(8)] + [{"gains": {str(i): 1, str(i + 1): 2}} for i in range(4)]
        rows = [type(task).canonical({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
    found = vectors(12)
    order = np.random.default_rng(2).permutation(12)
    shuffled = metric(task, found[order], [rows[i] for i in order])
    assert shuffled == pytest.approx(metric(task, found, rows))


def test_a_search_by_hand(tmp_path):
    """Documents at 0°, 30°, 60° and 90°; a query at 10° with gains 1 for the second, 2 for the third."""
    task = loaded(tmp_path, "retrieval", width=2)
    labels = [{"document": name} for name in "abcd"] + [{"gains": {"b": 1, "c": 2, "d": 0}}]
    rows = [type(task).canonical({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
    angles = np.radians([0, 30, 60, 90, 10])
    found = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [2], [3], [4], [5]])
    ideal = 2 + 1 / math.log2(3)
    assert metric(task, found, rows) == pytest.approx((1 / math.log2(3) + 2 / 2) / ideal)
    further = task.further(found, rows)
    assert further["MRR@10"] == 0.5
    assert further["recall@100"] == 1.0
    assert task.stats(found, rows)[:4].tolist() == [[0, 0]] * 4  # documents are no queries


@pytest.mark.parametrize(("problem", "of"), [("retrieval", ndcg), ("retrieval-mrr", mrr), ("retrieval-recall", recall)])
def test_a_search_of_a_larger_corpus_is_that_of_all_its_scores(tmp_path, problem, of, monkeypatch):
    task, draw = loaded(tmp_path, problem, width=4), np.random.default_rng(3)
    gains = [{str(i): float(draw.integers(0, 3)) for i in draw.choice(400, 60)} for _ in range(7)]
    labels = [{"document": str(i)} for i in range(400)] + [{"gains": of_query} for of_query in gains]
    rows = [type(task).canonical({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
    found = draw.choice([-1, 1], (407, 4)).astype(np.float32)  # many documents of equal scores
    scores = unit(found[400:]) @ unit(found[:400]).T
    expected = [
        float(of(row, np.array([one.get(str(i), 0) for i in range(400)])))
        for row, one in zip(scores, gains, strict=True)
    ]
    monkeypatch.setattr("kdexport.tasks.judgements._MOST_SCORES", 800)
    assert task.stats(found, rows)[400:, 0] == pytest.approx(expected)


def test_a_query_whose_documents_are_left_out_is_not_judged(tmp_path):
    task = loaded(tmp_path, "retrieval", width=2)
    labels = [{"document": "a"}, {"gains": {"a": 1}}, {"gains": {"too long": 1}}]
    rows = [type(task).canonical({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
    assert task.stats(vectors(3, width=2), rows).tolist() == [[0, 0], [1, 1], [0, 0]]


def test_smaller_formats_and_parts_are_judged_as_well(tmp_path):
    task, rows, found = loaded(tmp_path, "similarity", width=64), pairs_of(range(6)), vectors(12, width=64)
    further = task.further(found, rows)
    halves = [value for name, value in further.items() if "32" in name]
    assert halves == [pytest.approx(metric(task, found[:, :32], rows))]
    assert {"int8", "binary"} <= {word for name in further for word in name.replace(",", "").split()}


# --- vectors


def test_soft_targets_in_half_precision_have_nearly_the_same_cosines(tmp_path):
    task, found = loaded(tmp_path), vectors(50)
    back = task.unpack(task.pack(found))
    assert back.dtype == np.float32
    assert task.pack(found).nbytes * 2 == found.nbytes
    assert cosines(back, found) == pytest.approx(np.ones(50), abs=1e-5)


def test_a_difference_of_long_vectors_is_a_fraction_of_their_length(tmp_path):
    task = loaded(tmp_path)
    short, long = np.array([[0.6, 0.8]]), np.array([[600.0, 800.0]])
    assert task.difference(short + np.array([0, 1e-3]), short) == pytest.approx(1e-3)
    assert task.difference(long + np.array([0, 1e-3]), long) == pytest.approx(1e-6)
