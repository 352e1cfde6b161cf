"""Rows without labels, which the teacher alone labels: where they come from, and what becomes of them."""

# Fixtures come by import.
# ruff: noqa: F401, F811

import json

import msgspec
import numpy as np
import pandas as pd
import pytest
from near import apart
from teaching import LABELS, classify, data, data_stage, first, news, own_cache, settings, stage
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdexport import spec
from kdexport.data import read_rows, read_summary
from kdexport.data.read import Source
from kdexport.data.sources import local_files, read_unlabelled, rows_of_sources, to_rows
from kdexport.distill.store import Store, content_keys
from kdexport.distill.teacher import prepare_teacher
from kdexport.errors import DataError, ModelError
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_task
from kdexport.tasks import load_task
from kdexport.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def unlabelled(news, tmp_path_factory):
    """The same articles with labels in test alone, and texts that no split has, some of which stand in test."""

    def strip(work):
        for split in ("train", "validation"):
            rows = [row | {"label": None} for row in read_rows(work, split)]
            (work / f"{split}.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        known = read_rows(work, "test")[0] | {"id": "u:2", "label": None}
        new = {"id": "u:1", "text": "Shares in the airline rose after it beat forecasts.", "label": None}
        (work / "unlabelled.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in (new, known)))

    return data_stage(tmp_path_factory.mktemp("unlabelled") / "run", spec.Data(train=news), strip)


def test_the_teacher_labels_unlabelled_texts_and_changed_copies(tmp_path, unlabelled, news, first):
    given = settings(news, str(first), **{"distill.augment.views": 2})
    teacher, targets = stage(tmp_path / "run", unlabelled, given)
    rows, logits = read_rows(targets, "transfer"), np.load(targets / "transfer.npy")
    assert len(rows) == len(logits) > 150
    assert rows[0]["id"] == "u:1"
    assert {row["label"] for row in rows} == {None}
    ids = {row["id"] for row in rows}
    assert "u:1~2" in ids
    assert "u:2" not in ids  # it stands in test
    task, model = load_task(teacher), AutoModelForSequenceClassification.from_pretrained(teacher)
    assert apart(logits_of(model, task, rows[::20]), logits[::20]) < 1e-3
    record = json.loads((targets / "targets.json").read_text())
    assert set(record["teacher"]) == {"test"}
    assert record["texts"] == 120 + len(rows)


def test_the_preflight_takes_the_rows_that_have_labels(tmp_path, unlabelled, news, classify):
    wrong = classify(0, LABELS, words=[*LABELS[1:], LABELS[0]])
    with pytest.raises(ModelError, match=r"of 24 labelled rows rightly, which is near chance. Its label order"):
        stage(tmp_path / "run", unlabelled, settings(news, str(wrong)))


def test_a_few_labelled_rows_refuse_no_teacher_whose_answers_are_paid_for(tmp_path, news, base_model):
    """A wrong answer to one of two rows tells nothing."""

    def strip(work):
        every = []
        for split in ("train", "validation", "test"):
            rows = [*read_rows(work, split)]
            rows = [row if split == "train" and i < 2 else row | {"label": None} for i, row in enumerate(rows)]
            (work / f"{split}.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
            every += rows
        labels = [row["label"] and (LABELS.index(row["label"]) + 1) % 5 for row in every]
        Store(work / "logits").add(
            content_keys(row["text"] for row in every), np.eye(5, dtype=np.float32)[[c or 0 for c in labels]]
        )

    data = data_stage(tmp_path / "data", spec.Data(train=news), strip)
    asked = {"data.labels": LABELS, "student.base": str(base_model)}
    _, targets = stage(tmp_path / "run", data, settings(news, "openai:m@http://localhost:1/v1", **asked))
    assert json.loads((targets / "targets.json").read_text())["texts"] == 120


def test_there_is_no_fine_tuning_without_labels(tmp_path, unlabelled, base_model):
    wanted = spec.Teacher(model=str(base_model), train=spec.TeacherTraining(epochs=1))
    with pytest.raises(ModelError, match=r"the train rows have no labels to fine-tune the teacher on"):
        prepare_teacher(wanted, unlabelled, 32, 0, tmp_path)


def test_rows_without_labels_have_the_target_that_losses_pass_over(first, tmp_path):
    save_task(
        ModelAndProcessor(
            AutoModelForSequenceClassification.from_pretrained(first), AutoTokenizer.from_pretrained(first)
        ),
        32,
        LABELS,
        tmp_path,
    )
    task = load_task(tmp_path)
    assert task.label_array([{"label": "sports"}, {"label": None}, {"label": "4"}]).tolist() == [3, -100, 4]


def test_a_file_may_have_no_labels_where_none_are_needed():
    data = spec.Data(train="t.csv")
    source = Source("t.csv", ["text", "more"], [{"text": "a", "more": 1}, {"text": "b", "more": 2}])
    with pytest.raises(DataError, match="which column is the label"):
        to_rows(source, data, TextClassification)
    rows, bad, columns = to_rows(source, data, TextClassification, "if any")
    assert columns == {"text": "text"}
    assert (rows, bad) == (
        [{"id": "t.csv:1", "text": "a", "label": None}, {"id": "t.csv:2", "text": "b", "label": None}],
        0,
    )
    named = spec.Data(train="t.csv", label="kind")
    with pytest.raises(DataError, match="has no column 'kind'"):
        to_rows(source, named, TextClassification, "if any")
    half = Source("t.csv", ["text", "label"], [{"text": "a", "label": "x"}, {"text": "b", "label": ""}])
    with pytest.raises(DataError, match=r"t.csv, row 2: label is empty"):
        to_rows(half, data, TextClassification, "if any")
    assert [row["label"] for row in to_rows(half, data, TextClassification, "some")[0]] == ["x", None]


def test_unlabelled_texts_are_a_text_a_line_or_a_column_whose_labels_are_not_read(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,x\n")
    (tmp_path / "u.txt").write_text("\ufeffone\n\n  \ntwo\u2028 halves\r\n", encoding="utf-8")
    (tmp_path / "u.jsonl").write_text('{"text": "one", "label": "never seen"}\n{"text": "two"}\n')

    def given(name, **more):
        return spec.Data(train=str(tmp_path / "t.csv"), label="label", unlabelled=str(tmp_path / name), **more)

    lines, *_ = read_unlabelled(given("u.txt"), TextClassification)
    assert [(row["id"], row["text"], row["label"]) for row in lines] == [
        ("u.txt:1", "one", None),
        ("u.txt:4", "two\u2028 halves", None),
    ]
    rows, *_ = read_unlabelled(given("u.jsonl"), TextClassification)
    assert [(row["id"], row["text"], row["label"]) for row in rows] == [
        ("u.jsonl:1", "one", None),
        ("u.jsonl:2", "two", None),
    ]
    assert local_files(given("u.txt"))[-1] == tmp_path / "u.txt"
    assert rows_of_sources(given("u.jsonl")) == {"train": 1, "unlabelled": 2}
    assert rows_of_sources(given("u.txt"))["unlabelled"] == 4
    with pytest.raises(DataError, match=r"u.txt, row 4: text has 11 characters"):
        read_unlabelled(given("u.txt", max_chars=5), TextClassification)
    with pytest.raises(DataError, match="does not exist"):
        local_files(given("none.txt"))
    with pytest.raises(DataError, match="holds single texts, the data are pairs"):
        read_unlabelled(given("u.txt", text_pair="second"), TextClassification)


# --- the data stage


def csv(folder, name, rows, columns=("text", "label")):
    pd.DataFrame(rows, columns=list(columns)).to_csv(folder / name, index=False)
    return str(folder / name)


TEST = [(f"test text {i}", "ab"[i % 2]) for i in range(10)]
PLAIN = [(f"some text {i}",) for i in range(30)]


def test_training_texts_need_no_labels_where_the_test_has_them(tmp_path):
    given = spec.Data(train=csv(tmp_path, "t.csv", PLAIN, ["text"]), test=csv(tmp_path, "e.csv", TEST))
    folder = data_stage(tmp_path / "run", given)
    assert {row["label"] for split in ("train", "validation") for row in read_rows(folder, split)} == {None}
    assert len(read_rows(folder, "train")) == 27
    assert read_summary(folder).labels == ["a", "b"]
    assert read_summary(folder).duplicates.conflicting_labels == 0


def test_without_a_test_the_training_texts_need_labels(tmp_path):
    with pytest.raises(DataError, match=r"t\.csv: which column is the label\?"):
        data_stage(tmp_path / "run", spec.Data(train=csv(tmp_path, "t.csv", PLAIN, ["text"])))
    named = spec.Data(train=csv(tmp_path, "t.csv", PLAIN, ["text"]), test=csv(tmp_path, "e.csv", TEST), label="label")
    with pytest.raises(DataError, match=r"t\.csv has no column 'label'"):
        data_stage(tmp_path / "run", named)


def test_unlabelled_texts_of_the_splits_are_dropped_and_the_others_kept_once(tmp_path):
    train = csv(tmp_path, "t.csv", [(f"some text {i}", "ab"[i % 2]) for i in range(30)])
    (tmp_path / "more.txt").write_text("new\nsome text 3\ntest text 4\nnew\nother\n")
    given = spec.Data(train=train, test=csv(tmp_path, "e.csv", TEST), unlabelled=str(tmp_path / "more.txt"))
    folder = data_stage(tmp_path / "run", given)
    assert [(row["id"], row["text"]) for row in read_rows(folder, "unlabelled")] == [
        ("more.txt:1", "new"),
        ("more.txt:5", "other"),
    ]
    assert read_summary(folder).unlabelled == 2
    assert sum(read_summary(folder).rows.values()) == 40
    (tmp_path / "more.txt").write_text("some text 3\n")
    with pytest.raises(DataError, match="all unlabelled texts occur in train"):
        data_stage(tmp_path / "again", given)
