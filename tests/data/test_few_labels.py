"""Texts of which few have a label, or none: the labels are named in the spec, and those rows judge that have one."""

from __future__ import annotations

import json
import re

import pytest

from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.data.sources import recognised
from kdexport.errors import DataError, SpecError
from kdexport.pipeline.api import settings_of

LABELS = ("refund", "delay", "praise")


def write(path, n, labelled=0, label=lambda i: LABELS[i % 3]):
    rows = [{"text": f"Text number {i} about {LABELS[i % 3]}"} for i in range(n)]
    rows = [row | {"label": label(i)} if i < labelled else row for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(path, out, **data):
    prepare(spec.Data(train=str(path), **data), "text-classification", 0, out, few_labels=True)
    return {name: list(read_rows(out, name)) for name in ("train", "validation", "test")}


def labelled(rows):
    return sum(row["label"] is not None for row in rows)


def test_no_row_needs_a_label(tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"Text number {i}\n" for i in range(100)))
    found = split(tmp_path / "texts.txt", tmp_path / "data", labels=LABELS)
    assert [len(rows) for rows in found.values()] == [72, 8, 20]
    assert read_summary(tmp_path / "data").labels == sorted(LABELS)


@pytest.mark.parametrize(("n", "with_label", "of_test"), [(400, 60, 60), (400, 200, 80), (400, 400, 81), (400, 30, 0)])
def test_labelled_rows_judge_where_there_are_enough(tmp_path, n, with_label, of_test):
    """All of them, or a share; a test split is never labelled in part."""
    found = split(write(tmp_path / "rows.jsonl", n, with_label), tmp_path / "data")
    assert labelled(found["test"]) == of_test
    assert len(found["test"]) == (of_test or 80)
    assert sum(labelled(rows) for rows in found.values()) == with_label
    assert sum(len(rows) for rows in found.values()) == n


def test_a_row_with_another_label_is_named(tmp_path):
    rows = write(tmp_path / "rows.jsonl", 60, 60, lambda i: "prise" if i == 4 else LABELS[i % 3])
    with pytest.raises(DataError, match=r"rows.jsonl, row 5: label 'prise' is none of data.labels"):
        split(rows, tmp_path / "data", labels=LABELS)


def test_labels_that_nobody_names_are_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"no labels. Name them all: --labels refund,delay,praise"):
        split(write(tmp_path / "rows.jsonl", 60), tmp_path / "data")


def test_named_labels_make_texts_rows_of_a_classifier(tmp_path):
    """Texts alone are those of a language model otherwise."""
    (tmp_path / "texts.txt").write_text("One\nTwo\n")
    assert recognised(spec.Data(train=str(tmp_path / "texts.txt")))[0] == "causal-lm"
    assert recognised(spec.Data(train=str(tmp_path / "texts.txt"), labels=LABELS)) == (
        "text-classification", "single-label",
    )  # fmt: skip
    several = write(tmp_path / "rows.jsonl", 20, 20, lambda i: "refund|praise" if i == 3 else "delay")
    assert recognised(spec.Data(train=str(several), labels=LABELS))[1] == "multi-label"


ENDPOINT = "openai:gpt@http://localhost:8000/v1"


def settings(tmp_path, **given):
    (tmp_path / "texts.txt").write_text("One\nTwo\n")
    defaults = {"data": tmp_path / "texts.txt", "labels": "refund,delay", "teacher": ENDPOINT, "set": {}}
    return settings_of(None, defaults | given)


def test_flags_of_an_endpoint_are_keys_of_the_spec(tmp_path):
    found = settings(tmp_path, max_calls=500, set={"teacher.ask.by": "words"})
    assert found.data.labels == ("refund", "delay")
    assert (found.teacher.ask.max_calls, found.teacher.ask.by, found.teacher.ask.key) == (
        500,
        "words",
        "OPENAI_API_KEY",
    )


def test_labels_may_be_described(tmp_path):
    about = {"refund": "money back", "delay": "comes late", "praise": "money back"}
    assert settings(tmp_path, labels=None, set={"data.labels": about}).data.labels == about


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "openai:@http://localhost/v1"}, "names no model and URL"),
        ({"teacher": "openai:gpt@http://"}, "names no model and URL"),
        ({"teacher": "openai:gpt@http://me:secret@localhost/v1"}, "holds a password. Set teacher.ask.key"),
        ({"teacher": "openai:gpt@http://localhost/v1?key=secret"}, "a query after a question mark"),
        ({"set": {"teacher.ask.key": "sk-proj-0123"}}, "names no environment variable. Put the key into a variable"),
        ({"labels": "refund,delay,refund"}, "'refund' stands there twice"),
        ({"teacher": "some/model", "max_calls": 5}, "teacher.ask has no effect"),
        ({"teacher": [ENDPOINT, "some/model"]}, "answers some texts only has no others beside it"),
        ({"task": "causal-lm"}, "data.labels has no effect"),
        ({"task": "causal-lm", "labels": None}, "Take --task text-classification"),
        ({"set": {"teacher.ask.by": "letters", "teacher.ask.samples": 9}}, "samples has no effect"),
        ({"labels": "refund"}, "data.labels: expected .* of length >= 2"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_does_not_fit_an_endpoint_is_refused_before_any_work(tmp_path, given, message):
    with pytest.raises(SpecError, match=message) as raised:
        settings(tmp_path, **given)
    assert not re.search("secret|sk-proj", str(raised.value))
