"""Rankings from a file to an artifact: teachers with trained heads, a whole run, and answers."""

import json

import numpy as np
import pytest
import torch

import kdexport
from kdexport import spec
from kdexport.cli import app
from kdexport.data import prepare, read_rows
from kdexport.distill.student import build_student
from kdexport.distill.teacher import prepare_teacher
from kdexport.distill.teacher_outputs import Teacher
from kdexport.distill.teachers import TeacherFolder
from kdexport.errors import ModelError
from kdexport.models.embedder import Embedder, Steps
from kdexport.models.registry import task_of
from kdexport.results import read_report
from kdexport.tasks import load_task

TOPICS = ["wing", "rain", "bread", "music", "river", "engine", "garden", "winter", "paper", "silver"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Queries about a topic, with passages about it and about others."""
    draw, file = np.random.default_rng(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for i in range(60):
        topic = TOPICS[i % 10]
        for j in range(6):
            about = topic if j < 2 else draw.choice([other for other in TOPICS if other != topic])
            passage = f"{draw.choice(['old', 'new', 'some'])} {about} number {i}.{j}"
            lines.append({"query": f"what of {topic} {i}", "passage": passage, "label": 2 - j if j < 2 else 0})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("kind", ["one-label", "regression"])
def test_a_cross_encoder_is_a_teacher_as_it_is(pairs, classifier, tmp_path, kind):
    prepare(spec.Data(train=str(pairs)), "text-ranking", 0, tmp_path / "data")
    (tmp_path / "teacher").mkdir()
    prepare_teacher(spec.Teacher(model=str(classifier(kind))), tmp_path / "data", 16, 0, tmp_path / "teacher")
    task = load_task(tmp_path / "teacher")
    assert (task.name, task.answer_shape, task.config.function) == ("text-ranking", (1,), "none")


def test_a_classifier_of_several_labels_is_none(pairs, classifier, tmp_path):
    prepare(spec.Data(train=str(pairs)), "text-ranking", 0, tmp_path / "data")
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ModelError, match="scores by"):
        prepare_teacher(
            spec.Teacher(model=str(classifier("multi-label"))), tmp_path / "data", 16, 0, tmp_path / "teacher"
        )


def test_the_scores_of_an_embedder_are_cosines_and_students_take_its_layers(pairs, base_model, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    Embedder(AutoModel.from_pretrained(base_model), Steps()).save(tmp_path / "embedder")
    AutoTokenizer.from_pretrained(base_model).save_pretrained(tmp_path / "embedder")
    prepare(spec.Data(train=str(pairs)), "text-ranking", 0, tmp_path / "data")
    (folder := tmp_path / "teacher").mkdir()
    how = spec.Teacher(model=str(tmp_path / "embedder"))
    prepare_teacher(how, tmp_path / "data", 16, 0, folder)
    teacher, rows = (
        Teacher(TeacherFolder(folder, "", "torch", "t"), {}, how, 0),
        list(read_rows(tmp_path / "data", "test")),
    )
    teacher.read(rows, "t")
    model, encode = Embedder.open(tmp_path / "embedder"), AutoTokenizer.from_pretrained(base_model)
    with torch.no_grad():
        first, second = (
            model(**encode(rows[0][side], return_tensors="pt")).logits[0] for side in ("text", "text_pair")
        )
    assert teacher.answers(rows)[0, 0] == pytest.approx(torch.dot(first, second).item(), abs=1e-4)
    student = build_student(spec.Student(), "spread:1", folder).opened.model
    assert (student.config.num_labels, student.config.num_hidden_layers) == (1, 1)


@pytest.mark.parametrize(("marked", "task"), [(True, "text-ranking"), (False, "text-classification")])
def test_a_cross_encoder_of_sentence_transformers_is_exported_as_one(classifier, marked, task):
    from transformers import AutoConfig

    folder = classifier("one-label")
    config = AutoConfig.from_pretrained(folder)
    config.update({"sentence_transformers": {"version": "5"}} if marked else {})
    assert task_of(config, folder) == task


@pytest.mark.slow
def test_a_run_from_pairs_to_answers(pairs, base_model, tmp_path, capsys):
    settings = {
        "data.train": str(pairs), "data.max_length": 24, "teacher.model": str(base_model), "teacher.train.epochs": 8,
        "teacher.train.learning_rate": 5e-4, "teacher.train.batch_size": 16, "student.model": "spread:1",
        "distill.epochs": 8, "distill.batch_size": 16, "bench.rounds": 1, "bench.round_seconds": 0.1,
        "bench.precision": None, "bench.batch_sizes": [2],
    }  # fmt: skip
    kdexport.run(out=str(tmp_path / "run"), set=settings)
    report = read_report(tmp_path / "run/report.json")
    assert (report.task, report.metric, report.metric_higher_is_better) == ("text-ranking", "nDCG@10", True)
    best = next(variant for variant in report.variants if variant.name == report.recommended)
    assert best.metric.value > 0.7
    assert best.metric.ci95[0] <= best.metric.value <= best.metric.ci95[1]
    model = kdexport.load(tmp_path / "run")
    own, other = model.predict(
        [("what of wing 3", "some wing number 3.9"), ("what of wing 3", "some bread number 1.4")]
    )
    assert own.score > other.score
    (tmp_path / "asked.csv").write_text("query,passage\nwhat of rain,some rain\n")
    app(["predict", str(tmp_path / "run"), "--file", str(tmp_path / "asked.csv")], standalone_mode=False)
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer.keys() == {"text", "text_pair", "score"}
