"""The data sets that the examples name, as the hub stores them: Parquet files with a schema, in configurations.

There is no network here, so a few rows of each lie in a local folder of the same layout, which `datasets` opens alike.
"""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from datasets import Audio, ClassLabel, Features, Image, Sequence, Value
from PIL import Image as Pillow

from kdexport import spec
from kdexport.data.sources import SPLITS, _read_hub, to_rows
from kdexport.tasks import task_class

ROOT = Path(__file__).parents[2]
STRING = Value("string")
BIO = ["O", "B-person", "I-person"]


def picture():
    buffer = io.BytesIO()
    Pillow.fromarray(np.zeros((28, 28), np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def recording():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(800, np.float32), 8000, format="WAV")
    return {"bytes": buffer.getvalue(), "path": "0_theo_1.wav"}


# example → the columns of its hub data set, the value of each in two rows, and the labels that kdexport reads
LAYOUTS = {
    "text-classification": (
        {"text": STRING, "intent": ClassLabel(names=["restaurant_reviews", "nutrition_info", "oos"])},
        {"text": ["how good is it", "what is love"], "intent": [0, 2]},
        ["restaurant_reviews", "oos"],
    ),
    "multi-label": (
        {"text": STRING, "labels": Sequence(ClassLabel(names=["admiration", "joy", "neutral"])), "id": STRING},
        {"text": ["great!", "hm"], "labels": [[0, 1], [2]], "id": ["a", "b"]},
        ["admiration\x1fjoy", "neutral"],
    ),
    "regression": (
        {"sentence1": STRING, "sentence2": STRING, "score": Value("float64")},
        {"sentence1": ["A plane.", "A man."], "sentence2": ["An air plane.", "A dog."], "score": [1.0, 0.04]},
        ["1", "0.04"],
    ),
    "token-classification": (
        {"id": STRING, "tokens": Sequence(STRING), "ner_tags": Sequence(ClassLabel(names=BIO))},
        {"id": ["0", "1"], "tokens": [["Ada", "Lovelace", "sat"], ["it", "rains"]], "ner_tags": [[1, 2, 0], [0, 0]]},
        ["B-person I-person O", "O O"],
    ),
    "image-classification": (
        {"image": Image(), "label": ClassLabel(names=["T - shirt / top", "Trouser"])},
        {"image": [picture(), picture()], "label": [1, 0]},
        ["Trouser", "T - shirt / top"],
    ),
    "audio-classification": (
        {"audio": Audio(sampling_rate=8000), "label": Value("int64")},
        {"audio": [recording(), recording()], "label": [0, 9]},
        ["0", "9"],
    ),
    "causal-lm": ({"Text": STRING}, {"Text": ["First Citizen:", "Before we proceed"]}, ["", ""]),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path):
    """Write a data set as the hub has it, and return its name."""

    def make(features, rows, config):
        folder, place = tmp_path / "data-set", config or "data"
        (folder / place).mkdir(parents=True)
        for split in SPLITS:
            table = pa.Table.from_pydict(rows, schema=Features(features).arrow_schema)
            pq.write_table(table, folder / place / f"{split}-00000-of-00001.parquet")
        if not config:
            return str(folder)
        pq.write_table(pa.table({"text": ["of another"]}), folder / "other.parquet")
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in SPLITS]
        configs = [
            {"config_name": "other", "data_files": "other.parquet"},
            {"config_name": config, "data_files": files},
        ]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
        return f"{folder}:{config}"

    return make


@pytest.mark.parametrize("example", LAYOUTS)
def test_an_examples_hub_data_set_is_read_with_the_names_of_its_labels(example, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    settings = spec.load(ROOT / "examples" / f"{example}.yaml", {})
    features, rows, labels = LAYOUTS[example]
    name = hub(features, rows, settings.data.train.partition(":")[2])
    task = task_class(settings.task, settings.data.problem)
    found = _read_hub({"train": name})
    assert set(found) == {*SPLITS}
    for source in found.values():
        read = to_rows(source, settings.data, task)
        assert [row["label"] for row in read.rows] == labels
        assert read.bad == 0
    first = read.rows[0]
    match task.modality:
        case "text":
            assert first["text"] in ("how good is it", "great!", "A plane.", "Ada Lovelace sat", "First Citizen:")
            assert ("text_pair" in first and first["text_pair"] is not None) == (example == "regression")
        case kind:
            assert first[kind] == rows[kind][0]["bytes"]


def test_an_example_needs_no_name_of_a_column(monkeypatch):
    """So that --data alone puts other files into its place."""
    monkeypatch.chdir(ROOT)
    for path in (ROOT / "examples").glob("*.yaml"):
        data = spec.load(path, {}).data
        assert (data.text, data.text_pair, data.label, data.validation, data.test) == (None,) * 5, path.name
