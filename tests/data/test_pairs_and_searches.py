"""Data that judge vectors: both sides of a pair in one split, documents in all, and files that judge nothing."""

import json
import shutil

import pytest
from embedding import SENTENCES, TASK, write_pairs, write_texts

from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.data.sources import recognised
from kdexport.errors import DataError
from kdexport.tasks.judgements import judgement

SPLITS = ("train", "validation", "test")


def write_search(folder, queries=12, documents=20, splits=("test",)):
    """Write a folder in BEIR's layout: each query's words begin its two documents; one document equals a query."""
    (folder / "qrels").mkdir(parents=True)
    texts = SENTENCES[:documents]
    lines = [{"_id": f"d{i}", "text": f"{text} on a long day"} for i, text in enumerate(texts)]
    lines.append({"_id": "same", "text": SENTENCES[0]})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{"_id": f"q{i}", "text": SENTENCES[i]} for i in range(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    for k, split in enumerate(splits):
        judged = [f"q{i}\td{i}\t2\nq{i}\td{(i + 1) % documents}\t1\n" for i in range(k, queries, len(splits))]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(judged))
    return folder


def prepared(work, problem="single-label", task=TASK, **data):
    prepare(spec.Data(**{name: str(value) for name, value in data.items()}, problem=problem), task, 0, work)
    return {split: list(read_rows(work, split)) for split in SPLITS}


def test_both_sides_of_a_pair_come_into_one_split(tmp_path):
    splits = prepared(tmp_path / "work", "similarity", train=write_pairs(tmp_path, of_texts=True))
    assert [len(splits[split]) for split in SPLITS] == [58, 6, 16]  # of 40 pairs 8 to test, a tenth of the rest
    for rows in splits.values():
        pairs = [judgement(row["label"]).pair for row in rows]
        assert pairs[::2] == pairs[1::2]
        assert len(set(pairs)) == len(pairs) // 2
    everything = sorted(row["id"] for rows in splits.values() for row in rows)
    assert everything == sorted(f"pairs.csv:{i}.{side}" for i in range(1, 41) for side in (1, 2))


def test_the_documents_are_in_every_split_and_a_query_in_one(tmp_path):
    splits = prepared(tmp_path / "work", "retrieval", train=write_search(tmp_path / "search"))
    queries = []
    for rows in splits.values():
        labels = [judgement(row["label"]) for row in rows]
        assert sorted(label.document for label in labels if label.document) == sorted(
            [*(f"d{i}" for i in range(20)), "same"]
        )
        queries += [row["text"] for row, label in zip(rows, labels, strict=True) if label.gains]
    assert sorted(queries) == sorted(SENTENCES[:12])  # though one of them is a document's text as well
    audit = read_summary(tmp_path / "work").duplicates
    assert (audit.duplicates, audit.conflicting_labels, sum(audit.across.values())) == (0, 0, 0)
    assert (audit.near.conflicting_labels, audit.dropped) == (0, {"train": 0, "validation": 0})
    assert sum(audit.near.compared.values()) == 12  # documents are in every split on purpose


def test_a_folders_own_splits_are_taken(tmp_path):
    folder = write_search(tmp_path / "search", splits=("train", "dev", "test"))
    splits = prepared(tmp_path / "work", "retrieval", train=folder)
    asked = {split: {row["text"] for row in rows if judgement(row["label"]).gains} for split, rows in splits.items()}
    assert [len(asked[split]) for split in SPLITS] == [4, 4, 4]
    assert asked["test"] == {SENTENCES[i] for i in (2, 5, 8, 11)}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": "pairs.csv"}, "similarity"),
        ({"train": "texts.txt", "test": "pairs.csv"}, "similarity"),
        ({"train": "texts.txt"}, "single-label"),
        ({"train": "search"}, "retrieval"),
        ({"train": "texts.txt", "test": "search"}, "retrieval"),
        ({"train": "entailment.csv"}, "single-label"),
    ],
)
def test_what_judges_follows_from_the_data(tmp_path, data, problem):
    write_texts(tmp_path), write_pairs(tmp_path), write_search(tmp_path / "search")
    (tmp_path / "entailment.csv").write_text("sentence1,sentence2,label\na,b,entailment\nc,d,neutral\n")
    given = spec.Data(**{name: str(tmp_path / file) for name, file in data.items()})
    assert recognised(given, TASK) == (TASK, problem)


def test_classes_of_pairs_are_left_alone_where_none_is_a_score(tmp_path):
    lines = [f"{a},{b},entailment" for a, b in zip(SENTENCES[:40], SENTENCES[40:], strict=True)]
    (tmp_path / "nli.csv").write_text("\n".join(["sentence1,sentence2,label", *lines]))
    splits = prepared(tmp_path / "work", train=tmp_path / "nli.csv")
    assert {row["label"] for rows in splits.values() for row in rows} == {None}
    assert sum(map(len, splits.values())) == 80


@pytest.mark.parametrize(("problem", "test"), [("single-label", "texts.txt"), ("similarity", "pairs.csv")])
def test_a_search_to_train_on_judges_nothing_where_test_is_none(tmp_path, problem, test):
    write_texts(tmp_path), write_pairs(tmp_path), write_search(tmp_path / "search")
    splits = prepared(tmp_path / "work", problem, train=tmp_path / "search", test=tmp_path / test)
    assert {row["label"] for split in ("train", "validation") for row in splits[split]} == {None}
    assert {row["prompt"] for row in splits["train"]} <= {"query", "document"}


def bad(tmp_path, *rows):
    (tmp_path / "bad.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    return tmp_path / "bad.csv"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["a,b,1", "c,d,7"], "bad.csv, row 2: score 7 is not between 0 and 5"),
        (["a,b,1", "c,d,much"], "bad.csv, row 2: score 'much' is no number"),
        (["a,b,3", "c,d,3.0"], "test can't judge by Spearman correlation: all its pairs have the same score"),
        (["a,b,", "c,d,"], "test can't judge by Spearman correlation: it holds no pair of texts with a score"),
        (["a,b,1", " ,d,2"], "bad.csv, row 2: text is empty"),
        (["a,b,1", "c, ,2"], "bad.csv, row 2: text_pair is empty"),
    ],
)
def test_pairs_that_can_not_judge_are_one_line(tmp_path, rows, says):
    with pytest.raises(DataError, match=says) as error:
        prepared(tmp_path / "work", "similarity", train=write_texts(tmp_path), test=bad(tmp_path, *rows))
    assert "\n" not in str(error.value)


def test_bad_scores_can_be_left_out(tmp_path):
    data = spec.Data(
        train=str(write_texts(tmp_path)), test=str(bad(tmp_path, "a,b,1", "c,d,7", "e,f,2")), problem="similarity",
        skip_bad_rows=True,
    )  # fmt: skip
    prepare(data, TASK, 0, tmp_path / "work")
    assert [row["text"] for row in read_rows(tmp_path / "work", "test")] == ["a", "b", "e", "f"]
    assert read_summary(tmp_path / "work").bad_rows == 1


@pytest.mark.parametrize(("problem", "by"), [("similarity", "Spearman correlation"), ("retrieval", "nDCG@10")])
def test_single_texts_can_not_judge(tmp_path, problem, by):
    with pytest.raises(DataError, match=f"test can't judge by {by}: it holds no"):
        prepared(tmp_path / "work", problem, train=write_texts(tmp_path))


def test_a_search_can_not_be_judged_by_similarity_nor_pairs_by_a_search(tmp_path):
    texts = write_texts(tmp_path)
    with pytest.raises(DataError, match="it holds no pair of texts with a score"):
        prepared(tmp_path / "a", "similarity", train=texts, test=write_search(tmp_path / "search"))
    with pytest.raises(DataError, match="it holds no document"):
        prepared(tmp_path / "b", "retrieval", train=texts, test=write_pairs(tmp_path))


def test_a_judgement_of_a_document_that_is_not_there_is_one_line(tmp_path):
    folder = write_search(tmp_path / "search")
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\td99\t1\n")
    with pytest.raises(DataError, match=r"line 25: the document 'd99' is not in corpus\.jsonl"):
        prepared(tmp_path / "work", "retrieval", train=folder)


def test_texts_of_train_that_test_has_are_dropped_but_no_document_is(tmp_path):
    folder = write_search(tmp_path / "search")
    splits = prepared(tmp_path / "work", "retrieval", train=write_texts(tmp_path), test=folder)
    texts = {row["text"] for row in splits["train"]} | {row["text"] for row in splits["validation"]}
    assert texts.isdisjoint(SENTENCES[:12])  # queries
    assert len(splits["test"]) == 12 + 21
    shutil.rmtree(tmp_path / "work")
