"""The examples are read as they are written; that of texts is run, on fewer rows. Those of words, images and sound are
run where their tasks are tested."""

import csv
from pathlib import Path

import pytest

from kdexport import spec
from kdexport.results import read_report

ROOT = Path(__file__).parent.parent
CLINC = ROOT.parent / "shared" / "data" / "clinc150"
QUICK = ["bench.rounds=1", "bench.round_seconds=0.2", "bench.precision=null", "bench.batch_sizes=[4]"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_asks_for_what_there_is(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec.load(path, {})
    assert f"kdexport run examples/{path.name}" in path.read_text()


def of_four_intents(folder):
    """The rows of clinc150 about four of its intents."""
    if not CLINC.is_dir():
        pytest.skip(f"{CLINC} is not there")
    for split in ("train", "validation", "test"):
        with (CLINC / f"{split}.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["label"] in ("alarm", "balance", "cook_time", "weather")]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows({"text": row["text"], "label": row["label"]} for row in rows)
    return folder


@pytest.mark.slow
def test_the_example_of_texts_keeps_its_budget(tmp_path, kdexport, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = of_four_intents(tmp_path)
    flags = ["--data", data, "--teacher-epochs", "1", "--augment", "4", "--epochs", "8", "--no-baseline"]
    sets = [
        part for each in (*QUICK, "distill.batch_size=16", "teacher.train.batch_size=16") for part in ("--set", each)
    ]
    done = kdexport("run", "examples/text-classification.yaml", *flags, *sets, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run" / "report.json")
    assert report.budget.met
    assert report.variant("student-int8").size_bytes < 2e6
    assert report.variant("teacher-torch").metric.value > 0.9
