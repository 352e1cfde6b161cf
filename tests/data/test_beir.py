import json
from pathlib import Path

import pytest

from kdexport.data.beir import is_beir, read_beir
from kdexport.errors import DataError

CRANFIELD = Path(__file__).parents[3] / "shared" / "data" / "cranfield"
JUDGED = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\n"


def folder(place: Path, judged: str = JUDGED, split: str = "test", documents: str = "", queries: str = "") -> Path:
    (place / "qrels").mkdir(parents=True)
    default = [{"_id": "d1", "title": "Wings", "text": "They lift."}, {"_id": "d2", "text": "Rain falls."}]
    (place / "corpus.jsonl").write_text(documents or "".join(json.dumps(line) + "\n" for line in default))
    default = [{"_id": "q1", "text": "what lifts"}, {"_id": "q2", "text": "what falls", "metadata": {}}]
    (place / "queries.jsonl").write_text(queries or "".join(json.dumps(line) + "\n" for line in default))
    (place / "qrels" / f"{split}.tsv").write_text(judged)
    return place


def test_a_folder_has_documents_with_titles_queries_and_judgements(tmp_path):
    found = read_beir(folder(tmp_path))
    assert dict(found.documents()) == {"d1": "Wings They lift.", "d2": "Rain falls."}
    assert [*found.documents()] == [*found.documents()]
    assert found.queries == {"q1": "what lifts", "q2": "what falls"}
    assert found.judged == {"test": {"q1": {"d1": 2.0, "d2": 0.0}, "q2": {"d2": 1.0}}}


def test_judgements_need_no_line_of_names(tmp_path):
    assert read_beir(folder(tmp_path, "q1\td1\t1\n")).judged == {"test": {"q1": {"d1": 1.0}}}


@pytest.mark.parametrize("name", ["dev", "validation"])
def test_splits_have_the_names_of_other_data(tmp_path, name):
    folder(tmp_path, split=name)
    (tmp_path / "qrels" / "train.tsv").write_text("q2\td1\t3\n")
    assert read_beir(tmp_path).judged.keys() == {"train", "validation"}


def test_empty_documents_are_left_out_with_their_judgements(tmp_path, capsys):
    found = read_beir(folder(tmp_path, documents='{"_id": "d1", "text": ""}\n{"_id": "d2", "text": "Rain."}\n'))
    assert dict(found.documents()) == {"d2": "Rain."}
    assert found.judged == {"test": {"q1": {"d2": 0.0}, "q2": {"d2": 1.0}}}
    assert "1 empty document of" in capsys.readouterr().err


@pytest.mark.skipif(not CRANFIELD.exists(), reason="Cranfield is not here")
def test_cranfield_is_read():
    found = read_beir(CRANFIELD)
    assert (len(found.queries), sum(1 for _ in found.documents())) == (225, 1398)
    assert sum(map(len, found.judged["test"].values())) == 1836


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"judged": "q1\td9\t1\n"}, "test.tsv, line 1: the document 'd9' is not in corpus.jsonl. Leave"),
        ({"judged": JUDGED + "q9\td1\t1\n"}, "test.tsv, line 5: the query 'q9' is not in queries.jsonl. Leave"),
        ({"judged": JUDGED + "q1\td1\tgood\n"}, "test.tsv, line 5: the gain 'good' is no number"),
        ({"judged": JUDGED + "q1\td1\tinf\n"}, "test.tsv, line 5: the gain 'inf' is no number"),
        ({"judged": "q1 0 d1 1\n"}, "test.tsv, line 1: it has 1 fields, not query, document and gain"),
        ({"judged": "query-id\tcorpus-id\tscore\n"}, "test.tsv holds no judgements"),
        ({"judged": ""}, "test.tsv is empty"),
        ({"split": "others"}, "qrels holds no judgements. Name them train.tsv, dev.tsv or test.tsv"),
        ({"documents": '{"_id": "d1", "text": "a"}\nnonsense\n'}, "corpus.jsonl, line 2: it is no JSON object"),
        ({"documents": '{"_id": "d1", "txt": "a"}\n'}, "corpus.jsonl, line 1: it is no JSON object"),
        ({"queries": '{"_id": "q1", "text": " "}\n'}, "queries.jsonl, line 1: the text of 'q1' is empty"),
        ({"queries": '{"_id": 1, "text": "a"}\n\n{"_id": 1, "text": "b"}\n'}, "line 3: the _id '1' is there twice"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path, given, problem):
    with pytest.raises(DataError) as error:
        read_beir(folder(tmp_path, **given))
    assert problem in str(error.value)


@pytest.mark.parametrize("missing", ["corpus.jsonl", "queries.jsonl", "qrels"])
def test_a_missing_file_is_named(tmp_path, missing):
    assert is_beir(folder(tmp_path / "whole"))
    (tmp_path / "whole" / missing).rename(tmp_path / "elsewhere")
    assert not is_beir(tmp_path / "whole")
    with pytest.raises(DataError, match=f"whole holds no {missing}. BEIR's layout is corpus.jsonl"):
        read_beir(tmp_path / "whole")
