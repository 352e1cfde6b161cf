"""Fine-tuning a teacher: what is derived, how a new head begins and learns, why a teacher learned nothing."""

import json
from functools import partial

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from kdexport import spec
from kdexport.data import read_rows
from kdexport.distill.fine_tune import _start_at_base_rates, cause_of_chance
from kdexport.distill.teacher import prepare_teacher
from kdexport.distill.train import TrainConfig, _Trainer, fit
from kdexport.models.loading import open_config, open_model
from kdexport.spec import derive
from kdexport.tasks import load_task


def head_of(model, task, labels, fresh=("classifier.bias",)):
    _start_at_base_rates(model, fresh, task, np.array(labels))
    return model.classifier.bias.detach().numpy()


def test_a_new_head_begins_at_the_frequencies_of_the_labels(finished):
    task = load_task(finished / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
    trained = model.classifier.bias.detach().numpy().copy()
    assert (head_of(model, task, [0, 0, 1], fresh=()) == trained).all()
    found = head_of(model, task, [0] * 95 + [1])
    assert np.exp(found).sum() == pytest.approx(1)
    assert np.exp(found)[0] == pytest.approx(96 / 101)


def test_weights_that_no_file_had_learn_ten_times_as_fast(finished, base_model, tmp_path):
    task, rows = load_task(finished / "teacher"), read_rows(finished / "data", "train")[:16]
    opened = open_model(str(base_model), open_config(str(base_model)), "text-classification", task.labels)
    assert opened.fresh == {"classifier.weight", "classifier.bias"}
    config = TrainConfig(epochs=1, learning_rate=1e-4, batch_size=8, seed=0)
    made = partial(fit, opened.model, task, rows, None, config, validation=rows, work=tmp_path, title="t")
    rates = []

    class Recorded(_Trainer):
        def create_optimizer(self, *models):
            optimizer = super().create_optimizer(*models)
            rates.append({group["lr"] for group in optimizer.param_groups})
            assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*self.model.parameters()])
            return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdexport.distill.train._Trainer", Recorded)
        made(fresh=opened.fresh)
        made()
    assert rates == [{1e-4, 1e-3}, {1e-4}]


@pytest.mark.slow
def test_a_teacher_without_a_head_is_fine_tuned_unasked(finished, base_model, tmp_path):
    prepare_teacher(spec.Teacher(model=str(base_model)), finished / "data", 32, 0, tmp_path)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["recipe"]["epochs"] == 8
    assert record["recipe"]["patience"] is None  # so few validation rows choose no epoch
    assert record["curve"][-1]["validation"] > 0.85


@pytest.mark.parametrize(
    ("rows", "labels", "losses", "says"),
    [
        (100, 50, [4.0, 3.9], "Most likely 100 rows are too few for 50 labels"),
        (1000, 5, [1.6, 0.1], "Most likely the labels are at fault: it learned the training rows (loss 1.6 → 0.1)"),
        (1000, 5, [1.6, 1.5], "Most likely it was trained too little: its loss hardly fell in 2 epochs (1.6 → 1.5)"),
    ],
)
def test_a_teacher_that_learned_nothing_is_refused_with_the_likely_cause(tmp_path, rows, labels, losses, says):
    assert cause_of_chance(tmp_path) is None
    record = {"recipe": {"learning_rate": 1e-4}, "curve": [{"loss": loss} for loss in losses]}
    (tmp_path / "training.json").write_text(json.dumps(record | {"rows": rows, "labels": labels}))
    assert cause_of_chance(tmp_path).startswith(says)


@pytest.mark.parametrize(
    ("rows", "validation", "labels", "width", "found"),
    [
        (15_000, 3_000, 150, 384, (3, 2e-4, 32, 2)),
        (180, 20, 5, 384, (9, 2e-4, 16, None)),
        (1_000, 250, 2, 768, (8, 5e-5, 16, 2)),
        (100_000, 5_000, 2, 1024, (3, 3e-5, 32, 2)),
        (60, 20, 2, 128, (27, 5e-4, 16, None)),
    ],
)
def test_a_teachers_training_is_derived_from_rows_labels_and_width(rows, validation, labels, width, found):
    how = derive.training(spec.TeacherTraining(), rows, validation, labels, width, trained=True)
    assert tuple(each and each.value for each in how) == found
    given = spec.TeacherTraining(epochs=2, learning_rate=1e-3, batch_size=8)
    assert [each.value for each in derive.training(given, rows, validation, labels, width, trained=True) if each] == [
        2, 1e-3, 8,
    ]  # fmt: skip
