"""Real texts (sentences of BBC News), the 6 × 384 teacher and a 2 × 128 student; speed does not ask for training."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from kdexport import spec
from kdexport.data import demo, prepare, read_rows, read_summary
from kdexport.distill.student import build_student
from kdexport.export import export_student
from kdexport.models.loading import open_config, open_model
from kdexport.models.saving import save_model, save_task


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    demo.write_bbc_news(folder / "bbc.jsonl")
    articles = [msgspec.json.decode(line) for line in (folder / "bbc.jsonl").read_bytes().splitlines()]
    # the title and the first sentences: of real, differing lengths
    rows = {part.strip(): a["label"] for a in articles for part in a["text"].split("\n")[:3] if 20 < len(part) < 400}
    lines = [msgspec.json.encode({"text": text, "label": label}) for text, label in rows.items()]
    (folder / "sentences.jsonl").write_bytes(b"\n".join(lines))
    settings = spec.Data(train=str(folder / "sentences.jsonl"))
    prepare(settings, "text-classification", 0, folder)
    return folder


@pytest.fixture(scope="session")
def rows(data):
    return read_rows(data, "train")


@pytest.fixture(scope="session")
def teacher(data, tmp_path_factory) -> Path:
    folder, source = tmp_path_factory.mktemp("teacher"), str(demo.teacher())
    labels = read_summary(data).labels
    opened = open_model(source, open_config(source), "text-classification", labels)
    save_task(opened, 96, labels, folder)
    save_model(opened, folder)
    return folder


@pytest.fixture(scope="session")
def student(data, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    opened = build_student(spec.Student(), "tiny", teacher).opened
    save_task(opened, 96, read_summary(data).labels, folder)
    save_model(opened, folder)
    return folder


@pytest.fixture(scope="session")
def exported(data, student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export_student(spec.Export(), student, folder, read_rows(data, "train"))
    return folder
