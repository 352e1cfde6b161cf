import json

import pandas as pd
import pytest

from kdexport import spec
from kdexport.data import demo, prepare, read_rows, read_summary
from kdexport.data.sources import local_files
from kdexport.errors import DataError

GOOD = "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))


def settings(train, **changes) -> spec.Data:
    return spec.load(None, {"data.train": str(train), "teacher.model": "t"} | changes).data


def go(tmp_path, text: str | bytes, name="t.csv", **changes):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return prepare_all(tmp_path, settings(path, **changes))


def read(tmp_path, data):
    local_files(data)
    prepare_all(tmp_path, data)


def prepare_all(tmp_path, data):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    prepare(data, "text-classification", 0, out)
    return {split: read_rows(out, split) for split in ("train", "validation", "test")}, read_summary(out)


def test_bbc_news_has_98_exact_duplicates_and_none_across_our_splits(tmp_path):
    demo.write_bbc_news(tmp_path / "bbc.jsonl")
    splits, summary = prepare_all(tmp_path, settings(tmp_path / "bbc.jsonl"))
    assert summary.duplicates.rows == 2225
    assert summary.duplicates.duplicates == 98
    assert set(summary.duplicates.across.values()) == {0}
    texts = [{row["text"] for row in rows} for rows in splits.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_the_demo_has_few_labels_much_text_and_no_article_twice(tmp_path):
    demo.write_few_labels(tmp_path)
    rows = {file.stem: [json.loads(line) for line in file.open()] for file in tmp_path.iterdir()}
    assert {name: len(some) for name, some in rows.items()} == {"train": 200, "test": 727, "unlabelled": 1200}
    assert len({row["text"] for some in rows.values() for row in some}) == 2127
    assert not any("label" in row for row in rows["unlabelled"])
    assert {row["label"] for row in rows["train"]} == {row["label"] for row in rows["test"]}


def test_splits_are_stratified_and_the_same_for_the_same_seed(tmp_path):
    text = "text,label\n" + "".join(f"t{i},{'rare' if i % 10 == 0 else 'common'}\n" for i in range(500))
    splits, summary = go(tmp_path, text)
    again, _ = go(tmp_path, text)
    assert {split: list(rows) for split, rows in splits.items()} == {split: list(rows) for split, rows in again.items()}
    assert summary.rows == {"train": 360, "validation": 40, "test": 100}
    assert sum(row["label"] == "rare" for row in splits["test"]) == 10
    assert sum(row["label"] == "rare" for row in splits["validation"]) == 4


def test_a_text_in_train_and_test_is_dropped_from_train(tmp_path):
    (tmp_path / "test.csv").write_text("text,label\ntext number 3,b\nnew,a\n")
    splits, summary = go(tmp_path, "text,label\n" + GOOD, **{"data.test": str(tmp_path / "test.csv")})
    assert "text number 3" not in {row["text"] for row in splits["train"] + splits["validation"]}
    assert sum(summary.duplicates.across.values()) == 1
    kept, _ = go(
        tmp_path, "text,label\n" + GOOD, **{"data.test": str(tmp_path / "test.csv"), "data.drop_duplicates": False}
    )
    assert "text number 3" in {row["text"] for row in kept["train"] + kept["validation"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "t.csv is empty"),
        ("text,label\n", "t.csv holds no rows"),
        ("words,label\na,b\n", "which column is the text? Name it with --text. Its columns: words, label"),
        ("text,kind\na,b\n", "which column is the label? Name it with --label"),
        ("text,label\n" + "x,a\n" * 9, "train: all 9 rows have the label 'a'"),
        ("text,label\n" + GOOD + "lone,c\n", "t.csv, row 41: class 'c' has this row alone"),
        ("text,label\nfine,a\n  ,b\n", "t.csv, row 2: text is empty. Mend the row, or leave such rows out"),
        ("text,label\nfine,a\nwhy,\n", "t.csv, row 2: label is empty"),
        ("text,label\nfine,a\n" + "y" * 200_000 + ",b\n", "t.csv, row 2: text has 200,000 characters"),
        (b"text,label\nfine,a\ncaf\xe9,b\n", "t.csv, line 3: byte 0xe9 is not UTF-8. Convert it"),
        (
            "text,label\nfine,a\none,two,three,four\n",
            "t.csv, row 2: it has 4 fields, and the header names 2. Mend the row",
        ),
        ("text,text\na,b\n", "its first row must name the columns, each once"),
    ],
)
def test_bad_input_is_one_line_that_says_where(tmp_path, text, says):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        read(tmp_path, settings(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path):
    bad = " ,a\nno label,\n" + "y" * 200_000 + ",b\nlone,c\n"
    splits, summary = go(tmp_path, "text,label\n" + GOOD + bad, **{"data.skip_bad_rows": True})
    assert summary.bad_rows == 4
    assert sum(map(len, splits.values())) == 40


def test_columns_that_are_guessed_are_named_and_those_that_were_given_are_not(tmp_path, capsys):
    go(tmp_path, "utterance,intent\n" + GOOD)
    assert "data: columns utterance as text, intent as label\n" in capsys.readouterr().err
    go(tmp_path, "utterance,topic\n" + GOOD, **{"data.label": "topic"})
    assert "data: columns utterance as text\n" in capsys.readouterr().err
    go(tmp_path, "text,label\n" + GOOD)
    assert "columns" not in capsys.readouterr().err


def test_a_missing_file_and_a_missing_column_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv does not exist"):
        local_files(settings(tmp_path / "no.csv"))
    with pytest.raises(DataError, match=r"no column 'body'\. Its columns: text, label"):
        go(tmp_path, "text,label\n" + GOOD, **{"data.text": "body"})


def test_a_label_that_train_does_not_have_is_refused(tmp_path):
    (tmp_path / "test.csv").write_text("text,label\nnew,z\n")
    with pytest.raises(DataError, match=r"test\.csv, row 1: label 'z' occurs in no row of train"):
        go(tmp_path, "text,label\n" + GOOD, **{"data.test": str(tmp_path / "test.csv")})


def test_rows_without_any_label_are_said_to_have_none(tmp_path):
    with pytest.raises(DataError, match=r"the rows have no labels\. Is --label the right column\?"):
        go(tmp_path, "".join(f"line {i}\n" for i in range(20)), "t.txt")


def test_csv_tsv_jsonl_and_parquet_give_the_same_rows(tmp_path):
    table = pd.DataFrame(
        {"text": [f'say "{i}", NA\nnull' for i in range(30)], "label": [f"0{i % 3}" for i in range(30)]}
    )
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "a.parquet")
    found = []
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        splits, summary = prepare_all(tmp_path, settings(tmp_path / name))
        assert summary.labels == ["00", "01", "02"]
        found.append([(row["text"], row["label"]) for rows in splits.values() for row in rows])
    assert found[0] == found[1] == found[2] == found[3]


def test_texts_that_look_like_missing_values_stay_texts(tmp_path):
    splits, _ = go(tmp_path, "text,label\nNA,a\nnull,b\n" + GOOD)
    assert {"NA", "null"} <= {row["text"] for rows in splits.values() for row in rows}


def test_pairs_of_texts_are_recognised(tmp_path):
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 2} for i in range(40)]
    splits, summary = go(tmp_path, "\n".join(map(json.dumps, rows)), name="nli.jsonl")
    assert splits["train"][0]["text_pair"].startswith("h")
    assert summary.labels == ["0", "1"]


def test_a_folder_brings_its_own_splits(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.csv").write_text("text,label\n" + GOOD.replace("text", split))
    splits, summary = prepare_all(tmp_path, settings(folder))
    assert [splits[s][0]["text"].split()[0] for s in ("train", "validation", "test")] == ["train", "dev", "test"]
    assert summary.split_by_us == []


def test_a_hub_id_that_cannot_be_reached_says_so(tmp_path):
    with pytest.raises(DataError, match="no file and no data set on the hub: 'nobody/nothing'"):
        prepare_all(tmp_path, settings("nobody/nothing"))
