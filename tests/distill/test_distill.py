"""Teacher, soft targets, student and training."""

import numpy as np
import pytest
import torch
from near import apart
from transformers import AutoModelForSequenceClassification

from kdexport import spec
from kdexport.data import read_rows
from kdexport.distill.order import ByLength
from kdexport.distill.soft_targets import write_targets
from kdexport.distill.student import build_student
from kdexport.distill.teacher import match_labels, prepare_teacher
from kdexport.distill.train import TrainConfig, fit
from kdexport.errors import ModelError
from kdexport.models.inference import logits_of
from kdexport.spec import derive
from kdexport.tasks import load_task

# --- labels


@pytest.mark.parametrize(
    ("own", "known", "found"),
    [
        (["neg", "pos"], ["neg", "pos"], ["neg", "pos"]),
        (["pos", "neg"], ["neg", "pos"], ["pos", "neg"]),  # the teacher's order counts
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], ["positive", "negative"]),  # the data's spelling
        (["a", "b", "c"], ["a", "c"], ["a", "b", "c"]),  # the teacher may know more
        (["LABEL_0", "LABEL_1"], ["ham", "spam"], ["ham", "spam"]),
        (["ham", "spam"], ["0", "1"], ["ham", "spam"]),  # numbers are places in the teacher's order
    ],
)
def test_labels_of_teacher_and_data_are_brought_together(own, known, found):
    assert match_labels(own, known, "t") == found


@pytest.mark.parametrize(
    ("own", "known", "says"),
    [
        (["a", "b"], ["a", "b", "c"], "the data has 3 labels, teacher t knows 2"),
        (["a", "b"], ["a", "x"], "does not know the data's label 'x'; it knows a, b"),
    ],
)
def test_a_teacher_that_does_not_fit_the_data_is_refused(own, known, says):
    with pytest.raises(ModelError) as caught:
        match_labels(own, known, "t")
    assert says in str(caught.value)


def test_a_folder_without_tokenizer_is_one_line(finished, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="has no tokenizer"):
        prepare_teacher(spec.Teacher(model=str(tmp_path / "bare")), finished / "data", 32, 0, tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        prepare_teacher(spec.Teacher(model=str(tmp_path / "none")), finished / "data", 32, 0, tmp_path)


# --- soft targets


@pytest.fixture
def run_teacher(finished):
    """The finished run's teacher, and a record of the texts that it was asked for."""
    task = load_task(finished / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
    asked = []

    def run(rows, advance):
        asked.extend(task.content(row) for row in rows)
        return logits_of(model, task, rows)

    run.asked = asked
    return run


def test_the_teacher_reads_each_text_once_ever(finished, run_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    for out in ("first", "second"):
        (tmp_path / out).mkdir()
        write_targets(finished / "data", finished / "teacher", tmp_path / out, run_teacher)
        assert len(run_teacher.asked) == len(set(run_teacher.asked)) == 300
    assert np.array_equal(np.load(tmp_path / "first/train.npy"), np.load(tmp_path / "second/train.npy"))


def test_targets_are_looked_up_by_example_not_by_step(finished):
    task = load_task(finished / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
    for split in ("train", "test"):
        stored = np.load(finished / "targets" / f"{split}.npy")
        rows = read_rows(finished / "data", split)
        for i in (0, 7, len(rows) - 1):  # one at a time, whatever batch they were computed in
            assert apart(logits_of(model, task, [rows[i]])[0], stored[i]) < 1e-4


def test_a_teacher_with_another_label_order_is_refused_and_the_order_named(finished, copied, tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    task = load_task(finished / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")

    def rotated(rows, advance):
        return np.roll(logits_of(model, task, rows), 1, axis=1)

    (copied / "teacher" / "training.json").unlink()  # as of a teacher that was trained elsewhere
    with pytest.raises(ModelError) as caught:
        write_targets(copied / "data", copied / "teacher", tmp_path, rotated)
    assert "near chance" in str(caught.value)
    order = [*task.labels[-1:], *task.labels[:-1]]
    assert f"Its label order is not the data's: read as {', '.join(order)}" in str(caught.value)


def test_a_teacher_that_guesses_and_one_that_breaks_are_refused(finished, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    teachers = {
        "which is near chance": lambda rows, _: random.normal(size=(len(rows), 5)).astype(np.float32),
        "are not finite": lambda rows, _: np.full((len(rows), 5), np.nan, dtype=np.float32),
    }
    for says, teacher in teachers.items():
        monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / says))
        with pytest.raises(ModelError, match=says):
            write_targets(finished / "data", finished / "teacher", tmp_path, teacher)


# --- student

WHOLE = spec.Student(vocabulary="whole", start="embeddings")


def test_all_of_the_teachers_layers_are_the_teacher(finished):
    opened = build_student(WHOLE, "layers:2", finished / "teacher").opened
    task, rows = load_task(finished / "teacher"), read_rows(finished / "data", "test")[:20]
    assert apart(logits_of(opened.model, task, rows), np.load(finished / "targets/test.npy")[:20]) < 1e-4


def test_layers_n_keeps_the_lowest_layers(finished):
    opened, origin, *_ = build_student(WHOLE, "layers:1", finished / "teacher")
    teacher = AutoModelForSequenceClassification.from_pretrained(finished / "teacher").state_dict()
    ours = opened.model.state_dict()
    assert all(torch.equal(ours[name], teacher[name]) for name in ours)
    assert origin == "the teacher's layers 0"
    assert opened.model.config.num_hidden_layers == 1


def test_a_narrow_students_embeddings_keep_the_teachers_distances(finished):
    opened, origin, *_ = build_student(WHOLE, "tiny", finished / "teacher")
    teacher = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
    old, new = (m.get_input_embeddings().weight[1000:1500].double() for m in (teacher, opened.model))
    old, new = torch.pdist(old), torch.pdist(new)
    assert torch.corrcoef(torch.stack([old, new]))[0, 1] > 0.7
    assert "by PCA" in origin


def test_another_model_can_be_the_student(finished, base_model):
    opened = build_student(spec.Student(), str(base_model), finished / "teacher").opened
    assert opened.model.config.num_labels == 5
    assert opened.model.config.id2label[0] == load_task(finished / "teacher").labels[0]


def test_more_layers_than_the_teacher_has_are_refused(finished):
    with pytest.raises(ModelError, match="the teacher has 2 layers, not 7"):
        build_student(WHOLE, "layers:7", finished / "teacher")


# --- training


def test_by_length_sees_every_row_once_in_an_order_that_seed_and_epoch_decide():
    lengths = np.random.default_rng(0).integers(5, 90, 501)
    first, second = ByLength(lengths, 16, seed=3), ByLength(lengths, 16, seed=3)
    second.set_epoch(1)
    assert sorted(first) == sorted(second) == list(range(501))
    assert list(first) != list(second)
    first.set_epoch(1)
    assert list(first) == list(second)
    spread = np.mean([np.ptp(lengths[list(first)[i : i + 16]]) for i in range(0, 496, 16)])
    assert spread < np.ptp(lengths) / 10


def test_training_on_soft_targets_brings_the_student_to_the_teacher(finished, tmp_path):
    torch.manual_seed(0)
    opened = build_student(WHOLE, "tiny", finished / "teacher").opened
    task, rows = load_task(finished / "teacher"), read_rows(finished / "data", "train")[:32]
    soft = np.load(finished / "targets/train.npy")[:32]
    how = TrainConfig(epochs=60, learning_rate=2e-3, batch_size=8, seed=0, temperature=2.0, alpha=1.0)
    curve = fit(opened.model, task, rows, soft, how, validation=rows, work=tmp_path, title="t")
    assert [point["epoch"] for point in curve] == list(range(1, 61))
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    agreement = (logits_of(opened.model, task, rows).argmax(1) == soft.argmax(1)).mean()
    assert agreement > 0.9, curve
    assert not (tmp_path / "checkpoints").exists()


def test_values_left_open_are_derived_and_given_ones_kept():
    assert derive.epochs(spec.Distill(), 1600).value == 15
    assert derive.epochs(spec.Distill(), 200).value == 80
    assert derive.epochs(spec.Distill(), 50_000).value == 6
    assert derive.epochs(spec.Distill(), 10**7).value == 3
    assert derive.epochs(spec.Distill(epochs=4), 10).value == 4
    given = spec.Distill(learning_rate=2e-3)
    assert derive.learning_rate(given, spec.Student(), "layers:2", 512).value == 2e-3
