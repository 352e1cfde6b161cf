"""Runs of sentence embeddings, whole and small: judged by pairs, by a search, and by the teacher's neighbours."""

import csv
import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from embedders import write_embedder
from embedding import SENTENCES, TASK, write_pairs, write_texts
from scipy.stats import spearmanr

import kdexport as package
from kdexport import spec
from kdexport.pipeline.run import plan, run
from kdexport.results import read_report
from kdexport.tasks.vectors import cosines

SHARED = Path(__file__).parents[3] / "shared" / "data"
QUICK = {
    "task": TASK,
    "data.max_length": 16,
    "distill.epochs": 2,
    "distill.batch_size": 16,
    "bench.rounds": 2,
    "bench.round_seconds": 0.1,
    "bench.precision": None,
    "bench.batch_sizes": [4],
    "bench.time_limit_s": 600,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_texts(folder)
    write_pairs(folder)
    write_embedder(folder / "teacher")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))


def finished(world, out, problem, **changes):
    """A whole run, whose report is checked against its schema; what it reports, and its artifact."""
    given = spec.load(None, QUICK | {"teacher.model": str(world / "teacher"), "data.problem": problem} | changes)
    run(given, out)
    raw = json.loads((out / "report.json").read_text())
    jsonschema.validate(raw, json.loads((files("kdexport.schemas") / "report.schema.json").read_text()))
    return read_report(out / "report.json"), out / "artifact"


def named(report, name):
    return next(variant for variant in report.variants if variant.name == name)


def test_the_plan_names_the_length_that_the_teachers_texts_have(world):
    given = {"task": TASK, "teacher.model": str(world / "teacher"), "data.train": str(world / "texts.txt")}
    (shown,) = [row[1:] for row in plan(spec.load(None, given)) if row[0] == "data.max_length"]
    assert shown == ("512", "512, or the teacher's limit if that is less")


@pytest.mark.slow
def test_a_run_that_pairs_judge(world, tmp_path):
    pairs = {"data.train": str(world / "texts.txt"), "data.test": str(world / "pairs.csv")}
    report, artifact = finished(world, tmp_path / "run", "similarity", **pairs, **{"student.model": "bag"})
    assert report.task == TASK
    assert report.metric == "Spearman correlation"
    fp32 = named(report, "student-fp32")
    assert fp32.max_abs_diff < 1e-5
    model = package.load(f"{artifact}:fp32")
    with (world / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    both = [model.predict([row[side] for row in rows]) for side in ("sentence1", "sentence2")]
    a, b = (np.stack([vector.values for vector in side]) for side in both)
    expected = spearmanr(cosines(a, b), [float(row["score"]) for row in rows]).statistic
    assert fp32.metric.value == pytest.approx(expected, abs=1e-3)
    assert not any(variant.name.startswith("baseline") for variant in report.variants)
    assert "of fp32's nearest on validation" in report.reason
    card = (artifact / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "Spearman correlation" in card
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Spearman correlation" in page
    assert (artifact / "modules.json").is_file()
    assert json.loads((artifact / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True


def search_of(folder):
    """A part of Cranfield in BEIR's layout: eight queries, their relevant documents, and others."""
    source = SHARED / "cranfield"
    if not source.is_dir():
        pytest.skip("shared/data is not beside the repository")
    judged = [line.split("\t") for line in (source / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    asked = list(dict.fromkeys(query for query, _, _ in judged))[:8]
    wanted = [fields for fields in judged if fields[0] in asked]
    documents = {document for _, document, _ in wanted}
    (folder / "qrels").mkdir(parents=True)
    for name, known in (("queries", {*asked}), ("corpus", documents)):
        rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        rows = [row for i, row in enumerate(rows) if row["_id"] in known or (name == "corpus" and i < 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("".join("\t".join(fields) + "\n" for fields in wanted))
    return folder


@pytest.mark.slow
def test_a_run_that_a_search_judges(world, tmp_path):
    folder = search_of(tmp_path / "search")
    found = {"data.train": str(world / "texts.txt"), "data.test": str(folder)}
    report, artifact = finished(world, tmp_path / "run", "retrieval", **found, **{"student.model": "layers:1"})
    assert report.metric == "nDCG@10"
    teacher, student = named(report, "teacher-torch"), named(report, "student-fp32")
    assert 0 <= student.metric.value <= 1
    assert student.max_abs_diff < 1e-5
    assert {"MRR@10", "recall@100"} <= teacher.further.keys()
    assert package.load(artifact).predict(["what lifts a wing"])[0].values.shape == (32,)
    assert "nDCG@10" in (artifact / "README.md").read_text()


@pytest.mark.slow
def test_a_run_without_anything_that_judges(world, tmp_path):
    report, artifact = finished(
        world, tmp_path / "run", "single-label", **{"data.train": str(world / "texts.txt"), "student.model": "2x16"}
    )
    assert report.metric == "agreement with the teacher"
    assert named(report, "teacher-torch").metric.value == 1
    student = named(report, "student-fp32")
    assert student.metric.value == pytest.approx(student.agreement)
    assert "agreement with the teacher" in (artifact / "README.md").read_text()


def test_init_and_plan_know_the_task(world, kdexport, tmp_path):
    data = ("--data", world / "texts.txt", "--test", world / "pairs.csv")
    given = ("--task", TASK, "--teacher", world / "teacher", *data)
    out = tmp_path / "spec.yaml"
    found = kdexport("init", *given, "--out", out)
    assert found.returncode == 0, found.stderr
    text = out.read_text()
    assert "problem: similarity" in text
    assert "loss: cosine" in text
    planned = kdexport("run", out, "--plan")
    assert planned.returncode == 0, planned.stderr
    assert "similarity" in planned.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--student", "cnn"], "'cnn' is none for sentence-embedding. Take spread:3, tiny, 3x192 or bag"),
        (["--teacher-epochs", "2"], "teacher.train has no effect on sentence-embedding. Remove it"),
        (["--alpha", "0.5"], "distill.alpha: no label teaches sentence-embedding, so it is 1. Remove it"),
        (["--set", "data.problem=similarity"], "test can't judge by Spearman correlation: it holds no pair"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(world, kdexport, tmp_path, flags, says):
    given = ("--task", TASK, "--teacher", world / "teacher", "--data", world / "texts.txt", "--out", tmp_path / "run")
    found = kdexport("run", *given, *flags)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert says in line


def test_the_demos_teacher_is_exported_by_its_name(tmp_path):
    found = package.export("sentence-transformers/all-MiniLM-L6-v2", tmp_path / "artifact", variants="fp32")
    assert (found.model, found.task) == ("sentence-transformers/all-MiniLM-L6-v2", TASK)
    a, b, c = (
        one.values for one in package.load(tmp_path / "artifact").predict(["a cat sleeps", "a cat naps", "taxes"])
    )
    assert a @ b > 0.8 > 0.3 > a @ c


def test_a_pair_is_no_input_of_a_models_vectors(world, tmp_path):
    from kdexport.errors import DataError

    package.export(world / "teacher", tmp_path / "artifact", variants="fp32")
    with pytest.raises(DataError, match="is a pair of texts"):
        package.load(tmp_path / "artifact").predict([(SENTENCES[0], SENTENCES[1])])
