"""Text classification with several labels a text, and with numbers: rows, metrics, losses, whole runs."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import kdexport
from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.distill.losses import label_bce, label_mse, objective
from kdexport.errors import DataError, SpecError
from kdexport.pipeline import run as pipeline
from kdexport.tasks import judging
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.several import BETWEEN
from kdexport.tasks.text_classification import MultiLabelTexts, TextClassification, TextRegression


def make(kind, labels, function):
    config = {"task": "text-classification", "labels": labels, "inputs": ["input_ids"], "max_length": 8}
    return kind(TaskConfig(**config, function=function), Tokenizer(WordLevel()))


# --- metrics


def test_micro_f1_is_that_of_scikit_learn():
    task, draw = make(MultiLabelTexts, ["a", "b", "c"], "sigmoid"), np.random.default_rng(0)
    truth, logits = draw.integers(0, 2, (200, 3)), draw.normal(size=(200, 3))
    rows = [{"label": BETWEEN.join(np.array(task.labels)[row > 0])} for row in truth]
    assert (task.label_array(rows) == truth).all()
    assert judging.metric(task, logits, rows) == pytest.approx(f1_score(truth, logits > 0, average="micro"))
    assert task.further(logits, rows) == {"macro F1": pytest.approx(f1_score(truth, logits > 0, average="macro"))}
    low, high = judging.metric_interval(task, logits, rows)[1]
    assert low < judging.metric(task, logits, rows) < high
    assert np.isnan(task.label_array([{"label": None}])).all()
    assert judging.metric(task, np.full((1, 3), -1.0), [{"label": ""}]) == 1.0


def test_macro_f1_is_that_of_scikit_learn():
    task, draw = make(TextClassification, ["a", "b", "c"], "softmax"), np.random.default_rng(0)
    truth, logits = draw.integers(0, 3, 200), draw.normal(size=(200, 3))
    rows = [{"label": task.labels[i]} for i in truth]
    assert task.further(logits, rows) == {"macro F1": pytest.approx(f1_score(truth, logits.argmax(1), average="macro"))}


def test_correlations_are_those_of_scipy_however_far_from_zero():
    task, draw = make(TextRegression, ["value"], "none"), np.random.default_rng(0)
    truth = 1e6 + draw.normal(size=300)
    rows = [{"label": str(value)} for value in truth]
    logits = (truth - 1e6 + draw.normal(size=300))[:, None]
    exact = task.label_array(rows)[:, 0]
    assert judging.metric(task, logits, rows) == pytest.approx(pearsonr(exact, logits[:, 0]).statistic, abs=1e-6)
    assert task.further(logits, rows)["Spearman correlation"] == pytest.approx(spearmanr(exact, logits[:, 0]).statistic)
    assert task.further(np.zeros((300, 1)), rows)["Spearman correlation"] == 0  # a constant has no ranks
    value, (low, high) = judging.metric_interval(task, logits, rows)
    assert low < value < high
    assert judging.wrong_rows(task, logits, rows) is None
    assert judging.mcnemar(task, logits, logits, rows) is None
    task = make(TextRegression, ["value"], "none")
    assert judging.metric(task, np.full((300, 1), np.nan), rows) == 0
    assert judging.metric(task, logits, rows) == pytest.approx(value, abs=1e-6)  # whatever was judged before


# --- losses


def test_the_labels_term_of_several_labels_and_of_numbers():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")]])
    by_hand = (np.log(2) + np.log1p(np.exp(2))) / 2 / 2  # one labelled row of two
    assert label_bce(logits, labels).item() == pytest.approx(by_hand, rel=1e-5)
    assert label_mse(torch.tensor([[3.0], [9.0]]), torch.tensor([[1.0], [float("nan")]])).item() == 2.0
    terms = objective(logits, labels, logits, {"bce": 1.0}, temperature=1.0, alpha=0.9, hard="bce")
    assert [(term.name, round(term.weight, 6)) for term in terms] == [("bce", 0.9), ("bce of labels", 0.1)]


def test_a_loss_of_labels_that_exclude_each_other_is_refused():
    tree = {"data": {"train": "x.csv", "problem": "multi-label"}, "teacher": {"model": "t"}}
    assert spec.parse(tree, "s").distill.loss == "bce"
    with pytest.raises(SpecError, match=r"distill\.loss: kl is not for data\.problem multi-label"):
        spec.parse(tree | {"distill": {"loss": "kl"}}, "s")
    with pytest.raises(SpecError, match=r"data\.problem has no effect on token-classification"):
        spec.parse(tree | {"task": "token-classification"}, "s")


# --- rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_labels_come_as_lists_or_with_bars_between(tmp_path):
    rows = [{"text": f"text {i}", "label": ["b", "a"] if i % 3 else []} for i in range(30)]
    path = write(tmp_path / "train.jsonl", rows)
    prepare(spec.Data(train=str(path), problem="multi-label"), "text-classification", 0, tmp_path)
    assert read_summary(tmp_path).labels == ["a", "b"]
    assert {row["label"] for row in read_rows(tmp_path, "train")} == {"", f"a{BETWEEN}b"}
    path = tmp_path / "bars.csv"
    path.write_text("text,label\n" + "".join(f"text {i},a|c\n" for i in range(30)))
    prepare(spec.Data(train=str(path), problem="multi-label"), "text-classification", 0, tmp_path)
    assert read_summary(tmp_path).labels == ["a", "c"]


def test_a_label_that_is_no_number_is_named(tmp_path):
    rows = [{"text": f"t {i}", "label": str(i)} for i in range(20)]
    path = write(tmp_path / "train.jsonl", [*rows, {"text": "x", "label": "much"}])
    with pytest.raises(DataError, match=r"train\.jsonl, row 21: label 'much' is no number"):
        prepare(spec.Data(train=str(path), problem="regression"), "text-classification", 0, tmp_path)


# --- whole runs


def run(work, base_model, problem, rows, epochs, rate):
    data = write(work / "rows.jsonl", rows)
    how = work / "spec.yaml"
    how.write_text(
        f"data: {{train: {data}, problem: {problem}, max_length: 32}}\n"
        f"teacher: {{model: {base_model}, train: {{epochs: {epochs}, learning_rate: {rate}}}}}\n"
        f"student: {{model: layers:1}}\ndistill: {{epochs: 6, learning_rate: {rate}, baseline: false}}\n"
        "bench: {rounds: 1, round_seconds: 0.2, precision: null, batch_sizes: []}\nexport: {variants: [fp32]}\n"
    )
    pipeline.run(spec.load(how, {}), work / "run")
    report = msgspec.json.decode((work / "run" / "report.json").read_bytes())
    return report, {variant["name"]: variant for variant in report["variants"]}


@pytest.mark.slow
def test_several_labels_go_all_the_way(articles, base_model, tmp_path):
    money = [["money"] if {"£", "$"} & set(row["text"][:300]) else [] for row in articles]
    pairs = zip(articles, money, strict=True)
    rows = [{"text": row["text"][:300], "label": [row["label"], *more]} for row, more in pairs]
    report, variants = run(tmp_path, base_model, "multi-label", rows, epochs=12, rate="5e-4")
    assert report["metric"] == "micro F1"
    assert report["distillation"]["loss"] == "bce"
    assert variants["student-fp32"]["metric"]["value"] > 0.5
    assert {one["label"] for one in report["evidence"]["classes"]} == set(report["labels"])
    (answer,) = kdexport.load(tmp_path / "run").predict(["Shares rose by $3m after the merger"])
    assert sum(answer.scores.values()) != pytest.approx(1.0)  # each by itself
    config = json.loads((tmp_path / "run" / "artifact" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


@pytest.mark.slow
def test_numbers_go_all_the_way(articles, base_model, tmp_path):
    rows = [{"text": row["text"][:200], "label": float("sport" in row["label"]) + 0.1} for row in articles]
    report, variants = run(tmp_path, base_model, "regression", rows, epochs=5, rate="1e-3")
    assert report["metric"] == "Pearson correlation"
    assert variants["student-fp32"]["metric"]["value"] > 0.4
    assert variants["student-fp32"]["further"]["Spearman correlation"] > 0.3
    assert report["leakage"]["membership"] == {"teacher": None, "student": None}
    (sport, other) = kdexport.load(tmp_path / "run").predict(["The striker scored twice", "The minister resigned"])
    assert sport.score > other.score
