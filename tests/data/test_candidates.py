import math
from collections import Counter

import pytest
from test_beir import CRANFIELD, folder

from kdexport import spec
from kdexport.data import prepare, read_rows
from kdexport.data.candidates import best_by_bm25, read_candidates
from kdexport.data.sources import recognised
from kdexport.errors import DataError

TEXTS = ["a wing in a slipstream", "rain falls on a wing, and a wing", "heat in a slab", "Slipstream"]


def test_bm25_is_the_formula_of_its_authors():
    def score(query: str, text: str) -> float:
        words, every = text.lower().replace(",", "").split(), [t.lower().replace(",", "").split() for t in TEXTS]
        mean, total = sum(map(len, every)) / len(every), 0.0
        for word in query.split():
            there = sum(word in other for other in every)
            times = Counter(words)[word]
            rare = math.log(1 + (len(every) - there + 0.5) / (there + 0.5))
            total += rare * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * len(words) / mean))
        return total

    queries = ["wing slipstream", "heat", "wing wing a", "nothing of it"]
    for query, found in zip(queries, best_by_bm25(TEXTS, queries, 3), strict=True):
        scores = [score(query, text) for text in TEXTS]
        assert found.tolist() == sorted((i for i in range(4) if scores[i] > 0), key=lambda i: -scores[i])[:3]


def test_candidates_are_the_judged_documents_and_the_best_others(tmp_path):
    documents = "".join(f'{{"_id": "d{i}", "text": "{text}"}}\n' for i, text in enumerate(TEXTS))
    folder(
        tmp_path, "q1\td2\t1\nq1\td1\t0\n", documents=documents, queries='{"_id": "q1", "text": "wing slipstream"}\n'
    )
    rows = list(read_candidates(tmp_path, "test", 3).rows)
    assert [(row["passage"], row["gain"]) for row in rows] == [(TEXTS[2], 1.0), (TEXTS[1], 0.0), (TEXTS[0], 0.0)]
    assert {row["query"] for row in rows} == {"wing slipstream"}
    assert len(list(read_candidates(tmp_path, "test", 1).rows)) == 2  # all that are judged
    assert len(list(read_candidates(tmp_path, "train", 9).rows)) == 4


@pytest.mark.skipif(not CRANFIELD.exists(), reason="Cranfield is not here")
def test_queries_stay_whole_in_every_split(tmp_path):
    given = spec.Data(train=str(CRANFIELD), candidates=12)
    assert recognised(given) == ("text-ranking", "single-label")
    prepare(given, "text-ranking", 0, tmp_path)
    splits = {split: list(read_rows(tmp_path, split)) for split in ("train", "validation", "test")}
    queries = {split: {row["text"] for row in rows} for split, rows in splits.items()}
    assert sum(map(len, queries.values())) == len(set().union(*queries.values())) == 225
    assert len(queries["test"]) == 45
    assert all(min(Counter(row["text"] for row in rows).values()) >= 12 for rows in splits.values())


def test_a_file_of_pairs_has_queries_passages_and_labels(tmp_path):
    rows = [(f"q{i}", f"p{j} of {i}", j % 2) for j in range(4) for i in range(10)]
    (tmp_path / "pairs.csv").write_text("query,document,label\n" + "".join(f"{q},{p},{g}\n" for q, p, g in rows))
    prepare(spec.Data(train=str(tmp_path / "pairs.csv")), "text-ranking", 0, tmp_path / "out")
    test = list(read_rows(tmp_path / "out", "test"))
    assert Counter(Counter(row["text"] for row in test).values()) == {4: 2}
    assert test[0].keys() == {"id", "text", "text_pair", "label"}


def test_a_file_of_test_in_which_no_query_can_be_judged_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text(
        "query,passage,label\n" + "".join(f"q{i % 9},p{i},{i % 2}\n" for i in range(40))
    )
    (tmp_path / "test.csv").write_text("query,passage,label\na,b,1\nc,d,0\n")
    given = spec.Data(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"))
    with pytest.raises(
        DataError, match="test can't judge by nDCG@10: no query has several passages, one of them relev"
    ):
        prepare(given, "text-ranking", 0, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("query,label\na,1\nb,0\n", "pairs.csv: which column is the text_pair? Name it with --text-pair"),
        ("query,passage,label\na,b,1\na,c,1\n", "all labels are 1, so no passage is better"),
        ("query,passage,label\na,b,1\nc,d,0\n", "no query can be judged: there are 2 queries with one passage only"),
        ("query,passage,label\na,,1\na,c,0\n", "pairs.csv, row 1: text_pair is empty"),
        ("query,passage,label\na,b,good\na,c,0\n", "pairs.csv, row 1: label 'good' is no number"),
    ],
)
def test_pairs_that_can_not_be_ranked_are_refused(tmp_path, content, problem):
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(DataError) as error:
        prepare(spec.Data(train=str(tmp_path / "pairs.csv")), "text-ranking", 0, tmp_path / "out")
    assert problem in str(error.value)
