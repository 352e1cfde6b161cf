"""Several teachers, and several passes of one: aligned by name, each by its own tokenizer, and combined."""

# Fixtures come by import.
# ruff: noqa: F401, F811

import json
import shutil

import numpy as np
import pytest
import torch
from near import apart
from teaching import (
    LABELS,
    classify,
    data,
    first,
    news,
    one_line,
    own_cache,
    second,
    settings,
    stage,
    targets_of,
    torch_logits,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdexport import spec
from kdexport.data import read_rows
from kdexport.distill import teachers
from kdexport.distill.augment import changer
from kdexport.distill.combine import columns_of, combine
from kdexport.distill.store import Store, content_keys
from kdexport.errors import ModelError
from kdexport.models.inference import logits_of
from kdexport.tasks import load_task
from kdexport.tasks.metrics import softmax

# --- combining


def test_both_means_are_those_of_the_textbook():
    a, b = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    assert softmax(combine([a, b], None, "mean")) == pytest.approx(np.array([[0.7, 0.3]]), abs=1e-6)
    assert softmax(combine([a, b], None, "log-mean")) == pytest.approx(np.array([[0.75, 0.25]]), abs=1e-6)
    assert softmax(combine([a, b], [3, 1], "mean")) == pytest.approx(np.array([[0.8, 0.2]]), abs=1e-6)


def test_a_combination_is_logits_again_whatever_offset_the_answers_had():
    random = np.random.default_rng(0)
    z, weights = random.normal(size=(3, 50, 7)) * 4, [0.2, 0.5, 0.3]
    shifted = [logits + random.normal(size=(50, 1)) * 100 for logits in z]
    arithmetic = sum(w * softmax(logits) for w, logits in zip(weights, z, strict=True))
    assert softmax(combine(shifted, weights, "mean")) == pytest.approx(arithmetic, abs=1e-5)
    geometric = np.prod([softmax(logits) ** w for w, logits in zip(weights, z, strict=True)], axis=0)
    geometric /= geometric.sum(axis=1, keepdims=True)
    assert softmax(combine(shifted, [2, 5, 3], "log-mean")) == pytest.approx(geometric, abs=1e-5)
    for how in ("mean", "log-mean"):
        assert np.exp(combine(shifted, weights, how)).sum(axis=1) == pytest.approx(np.ones(50), abs=1e-5)
    softened = softmax(np.tensordot(weights, [np.log(softmax(logits / 4)) for logits in z], 1))
    assert softmax(combine(z, weights, "log-mean") / 4) == pytest.approx(softened, abs=1e-5)


def test_answers_that_are_sure_beyond_any_float_stay_finite_and_a_single_one_is_kept():
    sure = np.array([[1e4, -1e4, 0.0]])
    for how in ("mean", "log-mean"):
        found = combine([sure, sure[:, ::-1]], None, how)
        assert np.isfinite(found).all()
        assert found.dtype == np.float32
    assert combine([sure], [7.0], "mean") == pytest.approx(sure)


def test_columns_are_brought_together_by_name_and_differing_labels_are_named():
    assert columns_of(["a", "b", "c"], ["c", "a", "b"], "one", "two") == [1, 2, 0]
    with pytest.raises(ModelError) as error:
        columns_of(["a", "b"], ["b", "x"], "one", "two")
    assert "only one has 'a', only two has 'x'" in one_line(error)


# --- several teachers


def permuted(folder, out):
    """The same classifier with another tokenizer: token ids are exchanged, and the embeddings' rows with them."""
    model, raw = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        json.loads((folder / "tokenizer.json").read_text()),
    )
    place = np.arange(len(raw["model"]["vocab"]))
    place[1000:] = np.random.default_rng(0).permutation(place[1000:])
    raw["model"]["vocab"] = {token: int(place[i]) for token, i in raw["model"]["vocab"].items()}
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[torch.from_numpy(place)] = table.clone()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    (out / "vocab.txt").unlink(missing_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(raw))
    return out


def test_teachers_are_aligned_by_name_and_each_reads_by_its_own_tokenizer(tmp_path, data, news, first, second):
    other = permuted(second, tmp_path)
    rows = read_rows(data, "test")[:2]
    assert (load_task_ids(first, rows) != load_task_ids(other, rows)).any()
    given = settings(news, [str(first), str(other)], **{"teacher.weights": [1, 3], "teacher.combine": "mean"})
    _, targets = stage(tmp_path / "run", data, given)
    for split, logits in targets_of(targets).items():
        a, b = softmax(torch_logits(first, data, split)), softmax(torch_logits(second, data, split))[:, ::-1]
        assert softmax(logits) == pytest.approx((a + 3 * b) / 4, abs=1e-4)
    record = json.loads((targets / "targets.json").read_text())
    assert [one["model"] for one in record["teachers"]] == [str(first), str(other)]
    right = [LABELS.index(row["label"]) for row in read_rows(data, "test")]
    for one, folder, order in zip(record["teachers"], (first, second), (1, -1), strict=True):
        answers = torch_logits(folder, data, "test")[:, ::order].argmax(axis=1)
        assert one["test"] == pytest.approx(np.mean(answers == right))


def load_task_ids(folder, rows):
    return AutoTokenizer.from_pretrained(folder)([r["text"][:60] for r in rows], return_tensors="np", padding=True)[
        "input_ids"
    ]


def test_a_teachers_answers_are_kept_for_itself_whoever_stands_beside_it(tmp_path, data, news, first, second):
    stage(tmp_path / "one", data, settings(news, str(first)))
    _, targets = stage(tmp_path / "two", data, settings(news, [str(second), str(first)]))
    assert json.loads((targets / ".kdexport/computed.json").read_text()) == 120  # the second's alone
    _, again = stage(tmp_path / "three", data, settings(news, [str(second), str(first)], **{"teacher.weights": [2, 1]}))
    assert json.loads((again / ".kdexport/computed.json").read_text()) == 0


def test_stored_logits_can_stand_beside_a_model(tmp_path, data, news, first, second):
    whole = {split: torch_logits(second, data, split) for split in ("train", "validation", "test")}
    ids = {f"ids_{split}": [row["id"] for row in read_rows(data, split)] for split in whole}
    np.savez(tmp_path / "second.npz", labels=LABELS[::-1], **whole, **ids)
    _, targets = stage(tmp_path / "run", data, settings(news, [str(first), str(tmp_path / "second.npz")]))
    expected = combine([torch_logits(first, data, "test"), whole["test"][:, ::-1]], None, "log-mean")
    assert apart(np.load(targets / "test.npy"), expected) < 1e-3


def test_teachers_of_different_labels_are_refused_and_the_labels_named(tmp_path, data, news, first):
    model = AutoModelForSequenceClassification.from_pretrained(first, num_labels=6, ignore_mismatched_sizes=True)
    model.config.id2label = dict(enumerate([*LABELS, "weather"]))
    model.save_pretrained(tmp_path / "more")
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "more")
    with pytest.raises(ModelError) as error:
        stage(tmp_path / "run", data, settings(news, [str(first), str(tmp_path / "more")]))
    assert f"teachers of different labels can't be combined: only {tmp_path / 'more'} has 'weather'" in one_line(error)


def test_the_one_of_several_that_guesses_is_named(tmp_path, data, news, first, classify):
    wrong = classify(0, LABELS, words=[*LABELS[1:], LABELS[0]])
    with pytest.raises(ModelError) as error:
        stage(tmp_path / "run", data, settings(news, [str(first), str(wrong)]))
    assert f"teacher {wrong} answers" in one_line(error)
    assert "Its label order is not the data's" in one_line(error)


def test_each_of_several_is_fine_tuned_with_a_seed_of_its_own_and_kept_when_interrupted(
    tmp_path, data, news, base_model
):
    quick = {"teacher.train.epochs": 1, "teacher.train.batch_size": 43, "data.max_length": 8}
    given = settings(news, [str(base_model)] * 2, **quick)
    teachers.prepare_teachers(given, data, tmp_path)
    made = [named.folder for named in teachers.teachers_of(tmp_path)]
    assert made == [tmp_path, tmp_path / "1"]
    assert [json.loads((f / "training.json").read_text())["recipe"]["seed"] for f in made] == [0, 1]
    weights = [(folder / "model.safetensors").read_bytes() for folder in made]
    assert weights[0] != weights[1]
    shutil.rmtree(tmp_path / "1")
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    teachers.prepare_teachers(given, data, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "1/model.safetensors").read_bytes() == weights[1]


# --- several passes


def with_dropout(folder, out, rate):
    """The heads of these tests are fitted to differences that a usual rate would bury."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config |= {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_passes_with_dropout_differ_are_combined_and_kept(tmp_path, data, news, first, monkeypatch):
    model = with_dropout(first, tmp_path / "noisy", 0.003)
    given = settings(news, str(model), **{"teacher.passes": 3, "teacher.combine": "mean"})
    _, targets = stage(tmp_path / "run", data, given)
    plain = torch_logits(first, data, "test")
    noisy = softmax(np.load(targets / "test.npy"))
    assert np.abs(noisy - softmax(plain)).max() > 0.001
    passes = [Store(folder) for folder in (tmp_path / "cache/targets-2").iterdir()]
    contents = [row["text"] for row in read_rows(data, "test")]
    each = [softmax(store.look_up(content_keys(contents))) for store in passes]
    assert len(each) == 3
    assert noisy == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    assert np.abs(each[0] - each[1]).max() > 0.01
    assert json.loads((targets / ".kdexport/computed.json").read_text()) == 360
    _, again = stage(tmp_path / "again", data, given)
    assert json.loads((again / ".kdexport/computed.json").read_text()) == 0
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "other"))
    _, anew = stage(tmp_path / "anew", data, given)
    assert np.array_equal(np.load(anew / "test.npy"), np.load(targets / "test.npy"))  # seeded


def test_a_teacher_without_dropout_has_no_passes(tmp_path, data, news, first):
    folder = with_dropout(first, tmp_path / "still", 0.0)
    with pytest.raises(ModelError, match=r"no dropout that could tell its passes apart\. Take teacher.noise: augment"):
        stage(tmp_path / "run", data, settings(news, str(folder), **{"teacher.passes": 2}))


def test_passes_over_changed_words_are_of_the_text_and_its_copies(tmp_path, data, news, first):
    given = settings(news, str(first), **{"teacher.passes": 3, "teacher.noise": "augment"})
    teacher, targets = stage(tmp_path / "run", data, given)
    task, model = load_task(teacher), AutoModelForSequenceClassification.from_pretrained(teacher)
    rows = read_rows(data, "test")
    copies = changer(teacher, spec.Augment(views=2), 0)([row["text"] for row in rows])
    texts = [[row["text"] for row in rows], [c[0] for c in copies], [c[1] for c in copies]]
    expected = combine([logits_of(model, task, [{"text": t} for t in some]) for some in texts], None, "log-mean")
    assert apart(np.load(targets / "test.npy"), expected) < 1e-3
