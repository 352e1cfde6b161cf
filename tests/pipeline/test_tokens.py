"""Tagging words: what entities are, rows that are refused, and a whole run on real named entities."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from huggingface_hub import InferenceClient, constants
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from serve_process import served
from tagging import logits_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import kdexport
from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.errors import DataError
from kdexport.tasks import judging, load_task
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.inputs.words import words_in
from kdexport.tasks.tags import entities
from kdexport.tasks.token_classification import TokenClassification

ROOT = Path(__file__).parents[2]
WNUT = ROOT.parent / "shared" / "data" / "wnut17"
TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]


def task(max_length=8, labels=TAGS):
    config = TaskConfig(task="token-classification", labels=labels, inputs=["input_ids"], max_length=max_length)
    return TokenClassification(config, Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))


def rows_of(*tags):
    return [{"text": " ".join("abcdefgh"[: len(row.split())]), "label": row} for row in tags]


def test_entities_and_f1_are_those_of_seqeval():
    draw = random.Random(0)
    truth = [[draw.choice(TAGS) for _ in range(draw.randint(1, 8))] for _ in range(300)]
    guess = [[tag if draw.random() < 0.7 else draw.choice(TAGS) for tag in row] for row in truth]
    for row in truth:
        assert {(kind, start, end - 1) for kind, start, end in entities(row)} == set(get_entities(row))
    found, guesses = task(), [" ".join(row) for row in guess]
    rows = rows_of(*(" ".join(row) for row in truth))
    assert judging.metric(found, logits_of(found, guesses), rows) == pytest.approx(f1_score(truth, guess))


def test_the_interval_holds_the_metric_and_differences_are_paired():
    draw = random.Random(1)
    truth = [draw.choice(["B-person I-person O", "O B-place", "O O", "B-place O B-person"]) for _ in range(400)]
    found, rows = task(), rows_of(*truth)
    worse = logits_of(found, [t if draw.random() < 0.8 else " ".join("O" * len(t.split())) for t in truth])
    value, (low, high) = judging.metric_interval(found, worse, rows)
    assert low < value < high < 1
    lost, (low, high) = judging.difference(found, logits_of(found, truth), worse, rows)
    assert low < lost < high < 0
    assert judging.difference(found, worse, worse, rows) == (0, (0, 0))
    assert judging.mcnemar(found, logits_of(found, truth), worse, rows) < 1e-6


def test_a_row_without_names_is_no_division_by_zero():
    found = task()
    rows = rows_of("O O", "O")
    assert judging.metric(found, logits_of(found, ["O O", "O"]), rows) == 1.0
    assert judging.metric(found, logits_of(found, ["O B-place", "O"]), rows) == 0.0


def test_words_are_where_their_first_tokens_are(base_model):
    tokenizer = Tokenizer.from_file(str(base_model / "tokenizer.json"))
    config = TaskConfig(
        task="token-classification", labels=["O", "B-x"], inputs=["input_ids", "attention_mask"], max_length=8
    )
    found = TokenClassification(config, tokenizer)
    rows = [{"text": "unbelievably good"}, {"text": "a b c d e f g h i"}]
    places = found.encode(rows)["places"]
    pieces = sum(tokenizer.encode("unbelievably", add_special_tokens=False).attention_mask)
    assert pieces > 1
    assert places[0].tolist() == [1, 1 + pieces, *[-1] * 6]
    assert places[1].tolist() == [1, 2, 3, 4, 5, 6, -2, -2]  # of 8 tokens two are special, so words are cut off
    output = np.arange(2 * 8 * 2, dtype=np.float32).reshape(2, 8, 2)
    picked = found.gather(output, found.encode(rows))
    assert picked[0, 1].tolist() == output[0, 1 + pieces].tolist()
    assert not picked[0, 2:].any()
    answers = found.decode(picked, rows)
    assert found.decode(picked, rows)[1].words == list("abcdef")  # no more than the model reads
    assert len(answers[1].words) == len(answers[1].tags) == len(answers[1].scores) == 6


def test_a_text_is_cut_into_words():
    assert words_in("Ada's 2nd visit to St. Ives, at 5:30!") == [
        "Ada's", "2nd", "visit", "to", "St", ".", "Ives", ",", "at", "5", ":", "30", "!",
    ]  # fmt: skip


# --- rows


def settings(path, **more):
    return spec.Data(train=str(path), **more)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = [{"tokens": ["Ada", "sat", str(i)], "tags": ["B-person", "O", "O"]} for i in range(20)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "it has 2 words and 1 tags"),
        ({"tokens": ["a"], "tags": ["X"]}, "tag 'X' of word 1 is none of O, B-… and I-…"),
        ({"tokens": ["a b"], "tags": ["O"]}, "the word 'a b' is empty or has a space in it"),
        ({"tokens": ["a"], "tags": ["B-big place"]}, "the tag 'B-big place' is empty or has a space in it"),
        ({"tokens": [], "tags": []}, "text is empty"),
        ({"tokens": "a b", "tags": ["O"]}, "its words are no list of texts"),
        ({"tokens": ["a"], "tags": [1]}, "its tags are no list of texts"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path, row, problem):
    path = write(tmp_path / "train.jsonl", *GOOD, row)
    with pytest.raises(DataError, match=r"train\.jsonl") as error:
        prepare(settings(path), "token-classification", 0, tmp_path)
    assert str(error.value).startswith("train.jsonl, row 21: ")
    assert problem in str(error.value)
    prepare(settings(path, skip_bad_rows=True), "token-classification", 0, tmp_path)
    assert read_summary(tmp_path).bad_rows == 1
    assert read_summary(tmp_path).labels == ["O", "B-person"]


def test_the_scheme_of_tags_is_found_over_all_splits_and_said(tmp_path, capfd):
    """The test split alone would be IO."""
    train = [{"tokens": ["Ada", "Byron", str(i)], "tags": ["I-person", "B-person", "O"]} for i in range(20)]
    write(tmp_path / "train.jsonl", *train)
    write(tmp_path / "test.jsonl", {"tokens": ["Bob", "sat"], "tags": ["I-person", "O"]})
    prepare(settings(tmp_path), "token-classification", 0, tmp_path)
    assert "data: tags are IOB1, read as BIO\n" in capfd.readouterr().err
    assert read_rows(tmp_path, "train")[0]["label"] == "B-person B-person O"
    assert read_rows(tmp_path, "test")[0]["label"] == "B-person O"
    assert read_summary(tmp_path).bad_rows == 0


def test_words_may_hold_blanks_that_are_no_spaces(tmp_path):
    rows = [{"tokens": ["12\u00a0000", "km", str(i)], "tags": ["NUM", "NOUN", "NUM"]} for i in range(20)]
    prepare(settings(write(tmp_path / "train.jsonl", *rows)), "token-classification", 0, tmp_path)
    assert read_rows(tmp_path, "train")[0]["text"].startswith("12\u00a0000 km")


def test_parts_of_speech_are_labels_as_they_are(tmp_path, capfd):
    rows = [{"words": ["the", "dog", str(i)], "tags": ["DET", "NOUN", "NUM"]} for i in range(20)]
    prepare(settings(write(tmp_path / "train.jsonl", *rows)), "token-classification", 0, tmp_path)
    said = "data: tags are plain, such as DET, NOUN, NUM: judged by accuracy over words\n"
    assert said in capfd.readouterr().err
    assert read_summary(tmp_path).labels == ["DET", "NOUN", "NUM"]
    assert read_rows(tmp_path, "train")[0]["label"] == "DET NOUN NUM"


def test_old_newspapers_with_names_that_begin_with_i_are_read(tmp_path):
    dutch = WNUT.parent / "ner-dutch"
    if not dutch.is_dir():
        pytest.skip(f"{dutch} is not there")
    prepare(settings(dutch), "token-classification", 0, tmp_path)
    found = read_summary(tmp_path)
    assert (found.bad_rows, found.labels[0], len(found.labels)) == (0, "O", 7)
    longest = max((row["label"].split() for row in read_rows(tmp_path, "train")), key=len)
    assert len(longest) == 3640


def test_conll_files_are_read(tmp_path):
    text = "-DOCSTART- -X- O O\n\n" + "".join(f"Ada NNP I-NP B-person\nsat VBD O O\n{i} CD O O\n\n" for i in range(20))
    path = tmp_path / "train.conll"
    path.write_text(text)
    prepare(settings(path), "token-classification", 0, tmp_path)
    assert sum(read_summary(tmp_path).rows.values()) == 20
    assert read_rows(tmp_path, "train")[0]["label"] == "B-person O O"
    path.write_text("Ada B-person\nsat\n")
    with pytest.raises(DataError, match="line 2: 'sat' has no tag"):
        prepare(settings(path), "token-classification", 0, tmp_path)


# --- the whole


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """The example of words, on a part of its rows and fewer passes."""
    if not WNUT.is_dir():
        pytest.skip(f"{WNUT} is not there")
    work = tmp_path_factory.mktemp("wnut")
    for split, rows in (("train", 200), ("validation", 60), ("test", 120)):
        lines = (WNUT / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        named = [line for line in lines if b'"B-' in line]
        (work / f"{split}.jsonl").write_bytes(b"".join(named[:rows]))
    flags = ["--data", work, "--max-length", 32, "--teacher-epochs", 3, "--epochs", 2, "--augment", 1]
    flags += ["--no-baseline", "--min-retention", 0.3, "--out", work / "run"]
    for setting in ("rounds=1", "round_seconds=0.2", "precision=null", "batch_sizes=[4]"):
        flags += ["--set", f"bench.{setting}"]
    command = [sys.executable, "-m", "kdexport", "run", "examples/token-classification.yaml", *map(str, flags)]
    cache = {"KDEXPORT_CACHE": str(work / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return work / "run"


def test_a_run_says_how_well_names_are_found(tagged):
    report = msgspec.json.decode((tagged / "report.json").read_bytes())
    assert (report["task"], report["metric"]) == ("token-classification", "entity F1")
    variants = {variant["name"]: variant for variant in report["variants"]}
    assert variants["teacher-torch"]["metric"]["value"] > 0.15
    for variant in variants.values():
        low, high = variant["metric"]["ci95"]
        assert low <= variant["metric"]["value"] <= high
    assert variants["student-fp32"]["max_abs_diff"] < 1e-4
    assert {one["label"] for one in report["evidence"]["classes"]} <= set(report["labels"])
    assert 0 < report["leakage"]["membership"]["student"]["by_label"]["auc"] < 1
    page = (tagged / "report.html").read_text()
    assert "entity F1" in page


def test_a_student_keeps_the_tokens_of_names_that_training_lacks(tagged):
    assert load_task(tagged / "student").vocabulary == load_task(tagged / "teacher").vocabulary


def test_changed_copies_have_words_that_single_spaces_part(tagged):
    from kdexport.distill.augment import changer

    texts = [row["text"] for row in read_rows(tagged / "data", "train")[:50]]
    for copies in changer(tagged / "teacher", spec.Augment(views=4), 0)(texts):
        assert copies
        for copy in copies:
            assert TokenClassification.check({"text": copy}, 10_000, needs_label=False) is None
            assert all(copy.split(" "))


def test_an_artifact_tags_texts_and_lists_of_words(tagged):
    model = kdexport.load(tagged)
    text, words = model.predict(["Empire State Building, New York", ["Empire", "State"]])
    assert text.words == ["Empire", "State", "Building", ",", "New", "York"]
    assert len(text.tags) == 6
    assert words.words == ["Empire", "State"]
    done = subprocess.run(
        [sys.executable, "-m", "kdexport", "predict", str(tagged), "Empire State Building, New York"],
        capture_output=True,
        text=True,
    )
    (alone,) = model.predict(["Empire State Building, New York"])  # int8 scales activations by the whole batch
    assert json.loads(done.stdout)["tags"] == alone.tags


def test_optimum_loads_it_and_says_the_same(tagged, optimum):
    words = ["Empire", "State", "Building", ",", "New", "York"]
    (theirs,) = optimum("ORTModelForTokenClassification", tagged / "artifact", "model.onnx", [words])
    (ours,) = kdexport.load(tagged / "artifact", "fp32").predict([words])
    assert ours.tags == [tag for tag, _ in theirs]
    assert ours.scores == pytest.approx([score for _, score in theirs], abs=1e-4)


def test_the_server_speaks_to_hugging_faces_client(tagged, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    text = "Empire State Building, New York"
    (expected,) = kdexport.load(tagged).predict([text])
    with served(f"names={tagged}") as server:
        client = InferenceClient(server.url)
        every = client.token_classification(text, aggregation_strategy="none", ignore_labels=[])
        assert [one["entity"] for one in every] == expected.tags
        assert [text[one["start"] : one["end"]] for one in every] == expected.words
        found = client.token_classification(text)
        assert [one["entity_group"] for one in found] == [one["entity_group"] for one in expected.entities]
        assert all(one["word"] == text[one["start"] : one["end"]] for one in found)
