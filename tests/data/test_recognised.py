"""A run whose spec names no task takes the one that the data show."""

from __future__ import annotations

import io
import json
import wave

import pytest
from PIL import Image

from kdexport import spec
from kdexport.data.sources import recognised
from kdexport.pipeline import api

TEXTS = "text-classification"
ROWS = {
    "a label each": ([{"text": "good", "label": "yes"}], TEXTS, "single-label"),
    "numbered classes": ([{"text": "good", "label": 3}], TEXTS, "single-label"),
    "whole stars": ([{"text": "good", "label": 5.0}], TEXTS, "single-label"),
    "lists of labels": ([{"text": "a", "labels": []}, {"text": "b", "labels": ["c"]}], TEXTS, "multi-label"),
    "labels between bars": ([{"text": "a", "labels": "praise|delivery"}], TEXTS, "multi-label"),
    "fractions": ([{"sentence1": "a", "sentence2": "b", "score": score} for score in (5.0, 0.25)], TEXTS, "regression"),
    "words": ([{"tokens": ["Ada", "sings"], "ner_tags": ["B-PER", "O"]}], "token-classification", "single-label"),
    "texts": ([{"text": "Once upon a time"}], "causal-lm", "single-label"),
}  # fmt: skip


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return spec.Data(train=str(file))


@pytest.mark.parametrize(("rows", "task", "problem"), ROWS.values(), ids=[*ROWS])
def test_rows_show_their_task(tmp_path, capsys, rows, task, problem):
    assert recognised(write(tmp_path / "train.jsonl", rows)) == (task, problem)
    told = capsys.readouterr().err
    assert (f"task: {task}" in told) == ((task, problem) != ("text-classification", "single-label"))


def test_columns_that_fit_no_task_are_left_to_the_error_that_names_them(tmp_path):
    rows = write(tmp_path / "train.jsonl", [{"text": "good", "verdict": "yes"}])
    assert recognised(rows) == ("text-classification", "single-label")
    named = spec.Data(train=rows.train, label="verdict")
    assert recognised(named) == ("text-classification", "single-label")


def test_texts_without_labels_beside_a_labelled_test_split_are_no_language_model(tmp_path):
    write(tmp_path / "test.jsonl", [{"text": "good", "label": "yes"}])
    write(tmp_path / "train.jsonl", [{"text": "good"}])
    assert recognised(spec.Data(train=str(tmp_path)))[0] == "text-classification"


def test_files_are_known_by_their_content(tmp_path):
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    for folder, name in (("pictures", "a.png"), ("sounds", "a.wav")):
        (tmp_path / folder / "yes").mkdir(parents=True)
        (tmp_path / folder / "yes" / f"0{name}").write_bytes(b"broken")
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "yes" / "a.png")
    (tmp_path / "sounds" / "yes" / "a.wav").write_bytes(sound.getvalue())
    assert recognised(spec.Data(train=str(tmp_path / "pictures")))[0] == "image-classification"
    assert recognised(spec.Data(train=str(tmp_path / "sounds")))[0] == "audio-classification"
    write(tmp_path / "table" / "train.csv", [])
    (tmp_path / "table" / "train.csv").write_text(f"path,label\n{tmp_path}/pictures/yes/a.png,yes\n")
    assert recognised(spec.Data(train=str(tmp_path / "table")))[0] == "image-classification"


def test_a_task_that_is_named_is_taken(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS["words"][0]).train
    given = {"teacher": "t", "data": file}
    assert api.settings_of(None, given).task == "token-classification"
    assert api.settings_of(None, given | {"task": "text-classification"}).task == "text-classification"
    stars = write(tmp_path / "stars.jsonl", ROWS["fractions"][0]).train
    assert api.settings_of(None, {"teacher": "t", "data": stars}).data.problem == "regression"
    labels = {"teacher": "t", "data": stars, "set": {"data.problem": "single-label"}}
    assert api.settings_of(None, labels).data.problem == "single-label"
    assert api.settings_of({"teacher": {"model": "t"}, "data": {"train": file}}, {}).task == "token-classification"
