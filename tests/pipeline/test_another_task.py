"""A task of another package goes through the whole pipeline, without a line of ours that knows it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TRIAL = Path(__file__).parents[1] / "trial"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a Python where a package with the task is installed: its module and its entry point."""
    place = tmp_path_factory.mktemp("site")
    shutil.copy(TRIAL / "number_sums.py", place)
    metadata = place / "number_sums-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: number-sums\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[kdexport.tasks]\nnumber-sums = number_sums:NumberSums\n")
    path = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def kdexport(environment, *args, code=0):
    command = [sys.executable, "-m", "kdexport", *map(str, args)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == code, found.stderr
    return found


def test_a_task_of_another_package_goes_through_the_whole_pipeline(installed, base_model, tmp_path):
    draw = np.random.default_rng(0)
    high = [i % 2 for i in range(240)]
    sums = [draw.integers(100 * level, 100 + 900 * level, 4).tolist() for level in high]
    rows = [{"numbers": numbers, "label": ("low", "high")[level]} for numbers, level in zip(sums, high, strict=True)]
    file, out = tmp_path / "sums.jsonl", tmp_path / "run"
    file.write_text("\n".join(map(json.dumps, rows)))
    quick = {
        "task": "number-sums",
        "teacher.train.epochs": 5,
        "teacher.train.learning_rate": 1e-3,
        "distill.epochs": 3,
        "bench.rounds": 1,
        "bench.round_seconds": 0.1,
        "bench.precision": "null",
        "bench.batch_sizes": "[2]",
    }
    flags = [part for key, value in quick.items() for part in ("--set", f"{key}={value}")]
    kdexport(installed, "run", "--data", file, "--teacher", base_model, "--out", out, *flags)
    report = json.loads((out / "report.json").read_bytes())
    assert (report["task"], report["labels"]) == ("number-sums", ["high", "low"])
    best = next(v for v in report["variants"] if v["name"] == report["recommended"])
    assert best["metric"]["value"] > 0.6
    answers = kdexport(installed, "predict", out, "--file", file).stdout.splitlines()
    right = [json.loads(line)["label"] == row["label"] for line, row in zip(answers, rows, strict=True)]
    assert np.mean(right) > 0.6
    (tmp_path / "bad.jsonl").write_text('{"numbers": "seven", "label": "low"}\n' * 9)
    wrong = ["run", "--data", tmp_path / "bad.jsonl", "--teacher", base_model, "--out", tmp_path / "no", *flags]
    assert "its numbers are no list of whole numbers" in kdexport(installed, *wrong, code=2).stderr


def test_a_task_that_is_not_installed_is_one_line_that_names_those_that_are(tmp_path, base_model):
    args = ["run", "--data", "rows.jsonl", "--teacher", base_model, "--out", tmp_path / "run"]
    found = kdexport(os.environ, *args, "--set", "task=number-sums", code=2)
    assert "task: 'number-sums' is none of text-classification" in found.stderr
