"""Real texts, real weights, small: 300 BBC articles, and teachers made of the lowest layers of all-MiniLM."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KDEXPORT_CACHE"] = ""  # every test that runs a pipeline names its own

from kdexport import spec
from kdexport.data import demo


def pytest_report_header() -> str:
    from kdexport.bench.machine import environment

    facts = environment()
    return f"{facts['cpu']}, {facts['cores_allowed']} cores; " + ", ".join(
        f"{name} {version}" for name, version in facts["packages"].items()
    )


@pytest.fixture(scope="session")
def articles(tmp_path_factory) -> list[dict[str, str]]:
    """300 distinct BBC articles, 60 of each class, shuffled."""
    path = tmp_path_factory.mktemp("bbc") / "bbc.jsonl"
    demo.write_bbc_news(path)
    by_label = defaultdict(dict)
    for line in path.read_bytes().splitlines():
        row = msgspec.json.decode(line)
        by_label[row["label"]][row["text"]] = row
    rows = [row for found in by_label.values() for row in list(found.values())[:60]]
    random.Random(0).shuffle(rows)
    return rows


@pytest.fixture(scope="session")
def articles_file(articles, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "articles.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in articles))
    return path


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """The two lowest layers of all-MiniLM-L6-v2 with its tokenizer: a small pretrained model without a head."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("base") / "minilm-2"
    model = AutoModel.from_pretrained(demo.teacher(), num_hidden_layers=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.teacher()).save_pretrained(folder)
    return folder


CLASSIFIERS = {
    "single-label": {"num_labels": 3},
    "multi-label": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "one-label": {"num_labels": 1},
    "one-label-said-single": {"num_labels": 1, "problem_type": "single_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}


@pytest.fixture(scope="session")
def classifier(base_model, tmp_path_factory):
    """The base model with a random head of each kind, as someone else's `save_pretrained` folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def make(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base_model, **CLASSIFIERS[kind])
        with torch.no_grad():
            model.classifier.weight.mul_(20)
            model.classifier.bias.copy_(torch.linspace(-1, 1, CLASSIFIERS[kind]["num_labels"]))
        if kind == "single-label":
            model.config.id2label = {0: "good", 1: "bad", 2: "neither"}
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def settings(articles_file, base_model) -> dict:
    """Overrides of a spec whose run takes about half a minute."""
    return {
        "data.train": str(articles_file),
        "data.max_length": 32,
        "teacher.model": str(base_model),
        "teacher.train.epochs": 3,
        "teacher.train.learning_rate": 5e-4,
        "distill.epochs": 12,
        "distill.batch_size": 16,
        "distill.learning_rate": 1e-3,
        "bench.rounds": 2,
        "bench.round_seconds": 0.4,
        "bench.precision": None,
        "bench.batch_sizes": [8],
    }


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(settings, cache, tmp_path_factory) -> Path:
    """A finished run; tests only read it."""
    from kdexport.pipeline.run import run

    out = tmp_path_factory.mktemp("runs") / "finished"
    os.environ["KDEXPORT_CACHE"] = str(cache)
    run(spec.load(None, settings), out)
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def kdexport(cache):
    """Call the command line in a process of its own."""

    def call(*arguments: object, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kdexport", *map(str, arguments)],
            input=input,
            capture_output=True,
            text=True,
            env=os.environ | {"KDEXPORT_CACHE": str(cache), "COLUMNS": "200"} | environment,
            timeout=280,
        )

    return call


def as_flags(settings: dict) -> list[str]:
    """A spec's overrides as command-line flags."""
    return [
        part for key, value in settings.items() for part in ("--set", f"{key}={'null' if value is None else value}")
    ]
