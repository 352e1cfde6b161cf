"""Schemes of tags: recognised from all rows, converted to BIO and back to a model's own, as seqeval reads them."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from seqeval.metrics.sequence_labeling import get_entities
from tagging import logits_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kdexport.data.rows import write_rows
from kdexport.tasks import class_of, judging, tags
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.token_classification import PlainTags, TokenClassification

WORDS = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
SCHEMES = {
    "BIO": ["B-x I-x I-x O B-y B-y O", "B-x O O O O O O"],
    "IOB1": ["I-x I-x I-x O I-y B-y O", "I-x O O O O O O"],
    "BIOES": ["B-x I-x E-x O S-y S-y O", "S-x O O O O O O"],
    "BILOU": ["B-x I-x L-x O U-y U-y O", "U-x O O O O O O"],
    "BMES": ["B-x M-x E-x O S-y S-y O", "S-x O O O O O O"],
}


def rows_of(*labels):
    return [
        {"id": f"f:{i}", "text": " ".join("a" * len(label.split())), "label": label} for i, label in enumerate(labels)
    ]


def loaded(labels, max_length=8):
    config = TaskConfig(task="token-classification", labels=labels, inputs=["input_ids"], max_length=max_length)
    return class_of(config)(config, WORDS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_named_and_read_as_bio(scheme):
    rows, remark = TokenClassification.unified(rows_of(*SCHEMES[scheme]))
    assert [row["label"] for row in rows] == SCHEMES["BIO"]
    assert remark == ("tags are BIO" if scheme == "BIO" else f"tags are {scheme}, read as BIO")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_of_any_scheme_is_judged_and_trained_on_bio(scheme):
    rows, theirs = rows_of(*SCHEMES["BIO"]), SCHEMES[scheme]
    own = sorted({tag for row in theirs for tag in row.split()})
    known = TokenClassification.ordered({tag for row in SCHEMES["BIO"] for tag in row.split()})
    assert set(TokenClassification.known_as(known, own)) == set(own)
    task = loaded(own)
    assert [[own[i] for i in row if i >= 0] for row in task.label_array(rows)] == [row.split() for row in theirs]
    assert judging.metric(task, logits_of(task, theirs), rows) == 1.0
    assert all(not task.unknown(row) for row in rows)


def test_names_are_read_as_seqeval_reads_them():
    draw = random.Random(0)
    every = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "xy")]
    for _ in range(2000):
        row = [draw.choice(every) for _ in range(draw.randint(0, 8))]
        assert {(kind, start, end - 1) for kind, start, end in tags.entities(row)} == set(get_entities(row))


@pytest.mark.parametrize(
    ("labels", "found", "remark"),
    [
        (["I-x I-x O", "O I-y I-y"], ["B-x I-x O", "O B-y I-y"], "tags are IO, read as BIO"),
        (["person person O", "O place O"], ["B-person I-person O", "O B-place O"], "tags are IO, read as BIO"),
        (["O B-x I-y"], ["O B-x B-y"], "tags are BIO; an I- that begins a name (1 rows) is read as B-"),
        (["O O", "O"], ["O O", "O"], ""),
        (
            ["DET NOUN", "NOUN VERB"],
            ["DET NOUN", "NOUN VERB"],
            "tags are plain, such as DET, NOUN, VERB: judged by accuracy over words",
        ),
    ],
)
def test_other_tags_are_recognised_from_all_rows(labels, found, remark):
    rows, said = TokenClassification.unified(rows_of(*labels))
    assert ([row["label"] for row in rows], said) == (found, remark)


def test_tags_of_many_rows_are_not_held(tmp_path):
    rows = write_rows(tmp_path, "tags", ({"label": "B-x I-x O " * 10} for _ in range(3_000)))
    tracemalloc.start()
    converted, remark = TokenClassification.unified(rows)
    assert sum(row["label"].startswith("B-x I-x O B-x") for row in converted) == 3_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert remark == "tags are BIO"
    assert peak < 100_000


def test_a_tag_that_fits_no_scheme_is_named():
    rows = list(TokenClassification.unified(rows_of("O B-x", "O O NOUN"))[0])
    assert rows[0]["label"] == "O B-x"
    assert rows[1] == "tag 'NOUN' of word 3 is none of O, B-… and I-…"


def test_plain_tags_are_judged_word_by_word_and_unread_words_are_wrong():
    names = PlainTags.ordered({"NOUN", "ADJ", "VERB"})
    task = loaded(names, max_length=4)
    assert (names, type(task), task.metric.name) == (["ADJ", "NOUN", "VERB"], PlainTags, "accuracy")
    rows = rows_of("ADJ NOUN", "NOUN VERB ADJ ADJ ADJ ADJ")
    logits = logits_of(task, ["ADJ VERB", "NOUN VERB ADJ ADJ"])
    assert task.stats(logits, rows).tolist() == [[1, 2], [4, 6]]
    value, (low, high) = judging.metric_interval(task, logits, rows)
    assert value == 5 / 8
    assert low <= value <= high
    assert task.correct(logits, rows).tolist() == [False, False]
    first = task.decode(logits, rows)[0]
    assert first.to_dict(scores=False) == {"words": ["a", "a"], "tags": ["ADJ", "VERB"]}
    assert [(one["entity_group"], one["word"]) for one in first.entities] == [("ADJ", "a"), ("VERB", "a")]


def test_letters_are_plain_tags_even_with_an_o_among_them():
    assert tags.are_plain({*"NVAPOD,"})  # of tweets: nouns, verbs, …, and O is a pronoun
    assert not tags.are_plain({"O", "T"})
    assert not tags.are_plain({"O", "PER", "LOC"})
    assert not tags.are_plain({"O", "B-PER"})
    assert tags.are_plain({"NOUN", "B-NOUN", "I-NOUN"})


def test_a_word_that_is_not_read_is_outside_wherever_a_model_has_that_label():
    task = loaded(["B-x", "O"], max_length=2)
    arrays = {"places": np.array([[0, -2]])}
    found = task.gather(np.ones((1, 1, 2), dtype=np.float32), arrays)
    assert found[0].argmax(axis=-1).tolist() == [0, 1]
    assert task.words_read(found).tolist() == [1]
