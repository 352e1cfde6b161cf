"""Training: rows without labels, schedules, patience, the log of terms, kills; a tiny model on made-up sentences."""

import functools
import json
import os
from itertools import chain

import msgspec
import numpy as np
import pytest
import torch
from ranked import run_case
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from kdexport.distill import monitor, train
from kdexport.distill.losses import Term, objective
from kdexport.distill.order import ByLength, Parts
from kdexport.distill.train import TrainConfig, fit
from kdexport.errors import ModelError, SpecError
from kdexport.files import write_json
from kdexport.models.inference import logits_of
from kdexport.spec import Schedule
from kdexport.tasks.config import NO_LABEL, TaskConfig
from kdexport.tasks.text_classification import TextClassification

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "the", "film", "was", "and", "a", "story"]
HOW = TrainConfig(epochs=4, learning_rate=5e-3, batch_size=16, seed=0, temperature=2.0, alpha=0.5)


# Checkpoints a moment apart, as these tests write them, look to Transformers like a file system without times.
pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")


@pytest.fixture(scope="module")
def task() -> TextClassification:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = TaskConfig(
        task="text-classification", labels=["bad", "good"], inputs=["input_ids", "attention_mask"], max_length=16
    )
    return TextClassification(config, tokenizer)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """96 sentences of which one word says the label."""
    random = np.random.default_rng(0)
    found = []
    for i in range(96):
        label = i % 2
        words = [*random.choice(WORDS[6:], random.integers(2, 8)), WORDS[random.integers(3) + 3 * (1 - label)]]
        found.append({"text": " ".join(random.permutation(words)), "label": ["bad", "good"][label]})
    return found


@pytest.fixture(scope="module")
def soft(rows) -> np.ndarray:
    """Logits of a teacher that is right, and not very sure."""
    sign = np.array([1 if row["label"] == "good" else -1 for row in rows])
    return np.stack([-1.5 * sign, 1.5 * sign], axis=1).astype(np.float32)


def student(seed=0, **config) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS) + 2, max_position_embeddings=16, num_labels=2, **(sizes | config))
    )


@pytest.fixture(scope="module")
def teacher(task, tmp_path_factory):
    """A wider, deeper model as a finished teacher stage."""
    folder = tmp_path_factory.mktemp("teacher")
    model = student(seed=1, hidden_size=48, num_hidden_layers=2)
    with torch.no_grad():  # fresh weights attend to all tokens alike, which leaves nothing to learn
        for parameter in model.bert.encoder.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    task._tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "task.json", task.config)
    return folder


def change(**settings) -> TrainConfig:
    return msgspec.structs.replace(HOW, **settings)


def without_labels(rows) -> list[dict]:
    return [row | {"label": None} for row in rows]


# --- what is learned


def test_a_student_learns_from_the_teacher_what_no_label_says(task, rows, soft, tmp_path):
    model, unlabelled = student(), without_labels(rows)
    assert (task.label_array(unlabelled) == NO_LABEL).all()
    curve = fit(model, task, unlabelled, soft, change(epochs=8), validation=rows[:32], work=tmp_path, title="t")
    assert task.correct(logits_of(model, task, rows), rows).mean() > 0.95
    assert all(point["terms/ce"] == 0 for point in curve)
    assert curve[-1]["shares/ce"] == 0


def test_labels_may_be_there_for_some_rows(task, rows):
    some = [row if i % 3 else row | {"label": None} for i, row in enumerate(rows)]
    assert [row["label"] is None for row in some] == (task.label_array(some) == NO_LABEL).tolist()
    assert (task.label_array(some) == task.label_array(rows))[1::3].all()


def test_without_soft_targets_the_labels_are_all(task, rows, tmp_path):
    model, how = student(), change(epochs=8, losses={"kl": 1.0, "hidden": 1.0}, alpha=0.9)
    curve = fit(model, task, rows, None, how, validation=rows[:32], work=tmp_path, title="t")
    assert task.correct(logits_of(model, task, rows), rows).mean() > 0.95
    assert curve[-1].keys() == {"epoch", "loss", "validation"}


def test_losses_of_layers_draw_the_layers_together_and_leave_no_trace(task, rows, soft, teacher, tmp_path):
    model = student(attention_probs_dropout_prob=0.0)
    how = change(epochs=8, losses={"kl": 1.0, "hidden": 1.0, "attention": 50.0, "relation": 1.0})
    own = set(model.state_dict())
    curve = fit(model, task, rows, soft, how, validation=rows[:32], work=tmp_path, title="t", teacher=teacher)
    assert set(model.state_dict()) == own
    for name in ("kl", "hidden", "attention", "relation", "ce"):
        assert curve[-1][f"terms/{name}"] < curve[0][f"terms/{name}"], name
    assert sum(value for key, value in curve[0].items() if key.startswith("shares/")) == pytest.approx(1, abs=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_projections_are_trained(task, rows, soft, teacher, tmp_path, monkeypatch):
    seen = []

    class Noted(train.Matching):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append((self, self.of_layers.weight.detach().clone()))

    monkeypatch.setattr("kdexport.distill.layer_losses.Matching", Noted)
    how = change(epochs=1, losses={"kl": 1.0, "hidden": 1.0})
    fit(student(), task, rows, soft, how, validation=rows[:8], work=tmp_path, title="t", teacher=teacher)
    [(matching, before)] = seen
    assert (matching.of_layers.weight - before).abs().max() > 1e-3


# --- schedules


def test_schedules_run_from_the_first_step_to_the_last(task, rows, soft, tmp_path, monkeypatch):
    seen = []

    def noted(student, labels, teacher, losses, *, temperature, alpha, hard, packed):
        seen.append((losses["kl"], losses["mse"], temperature, alpha))
        return objective(student, labels, teacher, losses, temperature=temperature, alpha=alpha)

    monkeypatch.setattr(train, "objective", noted)
    how = change(
        losses={"kl": Schedule(start=0.0, end=2.0), "mse": 0.5},
        temperature=Schedule(start=4.0, end=1.0),
        alpha=Schedule(start=1.0, end=0.0),
    )
    curve = fit(student(), task, rows, soft, how, validation=rows[:8], work=tmp_path, title="t")
    steps = 4 * 6
    line = np.linspace(0, 1, steps)
    expected = np.stack([2 * line, np.full(steps, 0.5), 4 - 3 * line, 1 - line], axis=1)
    assert np.allclose(seen, expected)
    assert [point["epoch"] for point in curve] == [1, 2, 3, 4]


# --- the log of terms


def test_terms_are_mean_sizes_and_shares_are_norms_of_gradients(task, rows, soft, tmp_path):
    """Against plain PyTorch: one epoch of one batch, so that sizes and gradients are those of the first weights."""
    how = change(epochs=1, batch_size=96, losses={"kl": 2.0, "mse": 0.1}, alpha=0.7)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    [point] = fit(student(**still), task, rows, soft, how, validation=rows[:8], work=tmp_path, title="t")
    norms = {}
    for name, weight in (("kl", 0.7 * 2.0), ("mse", 0.7 * 0.1), ("ce", 0.3)):
        model = student(**still).train()
        inputs = {name: torch.from_numpy(array) for name, array in task.encode(rows).items()}
        logits, targets = model(**inputs).logits, torch.from_numpy(soft)
        labels = torch.from_numpy(task.label_array(rows))
        terms = objective(logits, labels, targets, {"kl": 2.0, "mse": 0.1}, temperature=2.0, alpha=0.7)
        size = next(term.size for term in terms if term.name == name)
        assert point[f"terms/{name}"] == pytest.approx(size.item(), abs=2e-6)
        (weight * size).backward()
        norms[name] = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    for name, norm in norms.items():
        assert point[f"shares/{name}"] == pytest.approx(norm / sum(norms.values()), rel=1e-3)


def test_a_ledger_means_the_steps_of_one_epoch():
    ledger = monitor.Ledger(1e-3)

    def epoch(sizes, after=0):
        for step, size in enumerate(sizes, start=after + 1):
            ledger.add(
                step, [Term("kl", 0.5, torch.tensor(size)), Term("ce", 0.5, torch.tensor(1.0))], torch.tensor(9.0)
            )
        return ledger.close_epoch()

    assert epoch([float(n) for n in range(120)]) == {"terms/kl": 59.5, "terms/ce": 1.0}
    ledger.add_shares({"kl": 0.75, "ce": 0.25})
    assert epoch([4.0, 6.0], after=120) == {"terms/kl": 5.0, "terms/ce": 1.0, "shares/kl": 0.75, "shares/ce": 0.25}
    assert epoch([4.0], after=122) == {"terms/kl": 4.0, "terms/ce": 1.0}


def test_measuring_shares_changes_nothing_that_is_learned(task, rows, soft, tmp_path, monkeypatch):
    def weights(every):
        monkeypatch.setattr(train, "_SHARES_EVERY", every)
        model = student()
        curve = fit(model, task, rows, soft, HOW, validation=rows[:8], work=tmp_path, title="t")
        return model.state_dict(), ["shares/kl" in point for point in curve]

    often, measured = weights(1)
    assert measured == [True, True, True, True]
    seldom, measured = weights(10**6)
    assert measured == [True, False, False, True]  # the last always
    assert all(torch.equal(often[name], seldom[name]) for name in often)


@pytest.mark.parametrize(("weight", "warns"), [(1.0, False), (1e4, True)])
def test_shares_are_said_once_and_one_sided_ones_warned_of(task, rows, soft, tmp_path, capsys, weight, warns):
    how = change(losses={"kl": 1.0, "mse": weight})
    fit(student(), task, rows, soft, how, validation=rows[:8], work=tmp_path, title="train student")
    said = capsys.readouterr().err
    assert said.count("train student: of the gradient, ") == 1
    assert ("warning: train student: mse is" in said) == warns


# --- judging epochs


def test_validation_without_labels_is_judged_by_agreement_with_the_teacher(task, rows, soft, tmp_path):
    model = student()
    curve = fit(
        model,
        task,
        rows,
        soft,
        change(epochs=8),
        validation=without_labels(rows[:32]),
        validation_targets=-soft[:32],  # a teacher that says the opposite of what is learned
        work=tmp_path,
        title="t",
    )
    agreement = (logits_of(model, task, rows[:32]).argmax(1) == (-soft[:32]).argmax(1)).mean()
    assert curve[-1]["validation"] == pytest.approx(agreement, abs=1e-6)
    assert agreement < 0.1


def test_validation_with_a_few_labels_is_judged_on_those(task, rows, soft, tmp_path):
    model, some = student(), [rows[0], *without_labels(rows[1:32]), rows[33]]
    curve = fit(model, task, rows, soft, HOW, validation=some, work=tmp_path, title="t")
    labelled = [rows[0], rows[33]]
    assert curve[-1]["validation"] == task.correct(logits_of(model, task, labelled), labelled).mean()


def test_validation_that_tells_nothing_is_left_out_and_cannot_be_waited_for(task, rows, soft, tmp_path):
    nothing = without_labels(rows[:8])
    curve = fit(student(), task, rows, soft, change(epochs=1), validation=nothing, work=tmp_path, title="t")
    assert "validation" not in curve[0]
    with pytest.raises(SpecError, match=r"distill\.patience needs a metric"):
        fit(student(), task, rows, soft, change(patience=2), validation=nothing, work=tmp_path, title="t")


def turned(rows) -> list[dict]:
    """The opposite labels: the better the training goes, the worse is the metric."""
    return [row | {"label": {"good": "bad", "bad": "good"}[row["label"]]} for row in rows[:32]]


def test_patience_stops_and_the_best_epoch_stands(task, rows, soft, tmp_path, capsys):
    how, worse = change(epochs=12, patience=3), turned(rows)
    model = student()
    curve = fit(model, task, rows, soft, how, validation=worse, work=tmp_path, title="t")
    metrics = [point["validation"] for point in curve]
    best = metrics.index(max(metrics))
    assert len(curve) == best + 1 + 3 < 12
    early = f"t: stopped early, as 3 epochs brought nothing better on validation; epoch {best + 1} of {len(curve)} was"
    assert early in capsys.readouterr().err
    assert task.correct(logits_of(model, task, worse), worse).mean() == pytest.approx(metrics[best], abs=1e-6)
    assert metrics[-1] < metrics[best]
    assert list(tmp_path.iterdir()) == []


def test_without_patience_the_last_epoch_stands(task, rows, soft, tmp_path):
    model, worse = student(), turned(rows)
    curve = fit(model, task, rows, soft, change(epochs=8), validation=worse, work=tmp_path, title="t")
    metrics = [point["validation"] for point in curve]
    assert len(metrics) == 8
    assert task.correct(logits_of(model, task, worse), worse).mean() == pytest.approx(metrics[-1], abs=1e-6)
    assert metrics[-1] < max(metrics)


# --- kills


SETTINGS = {
    "plain": change(epochs=4),
    "patience": change(epochs=8, patience=2),
    "layers": change(epochs=4, patience=2, losses={"kl": 1.0, "hidden": 1.0}, temperature=Schedule(start=4.0, end=1.0)),
}


@pytest.fixture(scope="module")
def trained(task, rows, soft, teacher, tmp_path_factory):
    """Train as one of the settings says, with a checkpoint after every epoch of three steps; weights and curve."""

    def run(kind, folder):
        model, how = student(), SETTINGS[kind]
        validation = turned(rows) if how.patience else rows[:32]  # so that patience ends before the epochs do
        layers = {"teacher": teacher} if kind == "layers" else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "CHECKPOINT_EVERY_S", 0.0)
            curve = fit(model, task, rows[:48], soft[:48], how, validation=validation, work=folder, title="t", **layers)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, curve

    run.whole = functools.cache(lambda kind: run(kind, tmp_path_factory.mktemp(kind)))
    return run


class Killed(BaseException):
    """Stands for a kill: nothing in the training handles it."""


def kill_at_step(step):
    def place(patch):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                raise Killed

        patch.setattr(monitor.Watch, "on_step_end", on_step_end)

    return place


def kill_after(owner, name, times=1):
    def place(patch):
        whole, calls = getattr(owner, name), []

        def around(*arguments, **named):
            calls.append(whole(*arguments, **named))
            if len(calls) == times:
                raise Killed
            return calls[-1]

        patch.setattr(owner, name, around)

    return place


PLACES = {
    "before the first checkpoint": kill_at_step(2),
    "after it": kill_at_step(5),
    "after the last": kill_at_step(9),
    "while the best weights are written": kill_after(monitor, "save_model"),
    "when they are": kill_after(monitor.Watch, "_keep"),
    "after a later checkpoint": kill_after(monitor.Watch, "on_save", times=2),
    "when it is over": kill_after(monitor.Watch, "restore"),
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("plain", "after it"),
        ("plain", "after a later checkpoint"),
        *(("patience", place) for place in PLACES),
        ("layers", "after it"),
    ],
)
def test_a_killed_training_ends_as_one_that_was_not(kind, place, trained, tmp_path):
    expected, curve = trained.whole(kind)
    assert len(curve) >= 3
    with pytest.MonkeyPatch.context() as patch:
        PLACES[place](patch)
        with pytest.raises(Killed):
            trained(kind, tmp_path)
    assert list(tmp_path.iterdir()) != [] or place == "before the first checkpoint"
    found, again = trained(kind, tmp_path)
    assert msgspec.json.encode(again) == msgspec.json.encode(curve)  # to the byte: what is written is hashed
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_jumps_back_makes_no_older_checkpoint_the_newest(trained, tmp_path, monkeypatch):
    end = monitor.Watch.on_epoch_end

    def in_the_future(self, *arguments, **named):
        for path in (tmp_path / "checkpoints").glob("*"):
            os.utime(path, (path.stat().st_mtime + 86400,) * 2)
        return end(self, *arguments, **named)

    monkeypatch.setattr(monitor.Watch, "on_epoch_end", in_the_future)
    kill_after(monitor.Watch, "on_save", times=2)(monkeypatch)
    with pytest.raises(Killed):
        trained("patience", tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-6"]


def test_a_checkpoint_that_a_power_cut_left_unfinished_is_not_taken(trained, tmp_path, monkeypatch):
    expected, _ = trained.whole("plain")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(monitor, "sync")(patch)  # before it is marked as whole
        with pytest.raises(Killed):
            trained("plain", tmp_path)
    (torn,) = (tmp_path / "checkpoints").iterdir()
    os.truncate(torn / "model.safetensors", 10)
    found, _ = trained("plain", tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_best_weights_are_kept_of_this_epoch_and_of_what_the_last_checkpoint_knows(
    task, rows, soft, tmp_path, monkeypatch
):
    kept, keep = [], monitor.Watch._keep

    def noted(self, model, epoch):
        keep(self, model, epoch)
        kept.append(sorted(int(path.stem) for path in self.folder.iterdir()))

    def run(every_s, metrics):
        left = iter(metrics)
        monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", every_s)
        monkeypatch.setattr(train, "_judge", lambda *_: (lambda model: next(left), True, ()))
        fit(student(), task, rows, soft, change(patience=2), validation=rows, work=tmp_path, title="t")

    monkeypatch.setattr(monitor.Watch, "_keep", noted)
    run(1e9, [0.1, 0.2, 0.3, 0.4])
    assert kept == [[1], [2], [3], [4]]
    with monkeypatch.context() as patch:
        kill_at_step(15)(patch)  # in the third epoch
        with pytest.raises(Killed):
            run(0.0, [0.1, 0.2])
    assert kept[4:] == [[1], [1, 2]]
    run(1e9, [0.3, 0.4])  # goes on from the second
    assert kept[6:] == [[2, 3], [2, 4]]


# --- what goes wrong


def test_a_start_that_takes_longer_than_a_line_of_progress_is_no_error(task, rows, soft, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kdexport.progress._PLAIN_LINE_EVERY_S", 0.0)
    fit(student(), task, rows, soft, change(epochs=1), validation=rows[:8], work=tmp_path, title="t")
    assert "  t: 1 of 6, about" in capsys.readouterr().err


@pytest.mark.parametrize("at", [1, 8, 24])
def test_a_loss_that_is_not_finite_stops_with_its_step_and_a_mend(at, task, rows, soft, tmp_path, monkeypatch):
    calls = []

    def broken(*arguments, **named):
        calls.append(1)
        terms = objective(*arguments, **named)
        return [Term(t.name, t.weight, t.size * (float("nan") if len(calls) == at else 1.0)) for t in terms]

    monkeypatch.setattr(train, "objective", broken)
    with pytest.raises(ModelError, match=f"the loss of step {at} is nan") as caught:
        fit(student(), task, rows, soft, HOW, validation=rows[:8], work=tmp_path, title="t")
    assert ("Lower the learning rate, to 0.001 say" in str(caught.value)) == (at > 1)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_losses_are_looked_at_every_fifty_steps(task, rows, soft, tmp_path, monkeypatch):
    calls = []

    def broken(*arguments, **named):
        calls.append(1)
        terms = objective(*arguments, **named)
        return [Term(t.name, t.weight, t.size * (float("inf") if len(calls) >= 7 else 1.0)) for t in terms]

    monkeypatch.setattr(train, "objective", broken)
    with pytest.raises(ModelError, match=r"the loss of step 7 is inf, that before was \d"):
        fit(student(), task, rows, soft, change(batch_size=1), validation=rows[:8], work=tmp_path, title="t")
    assert len(calls) == 50


def test_answers_that_are_not_finite_after_the_last_step_are_seen(task, rows, soft, tmp_path):
    how = change(epochs=1, batch_size=48, learning_rate=1e38)  # the first step only warms up
    with pytest.raises(ModelError, match="after epoch 1 the answers are not finite: training diverged"):
        fit(student(), task, rows, soft, how, validation=rows[:8], work=tmp_path, title="t")


def test_settings_that_teach_no_answers_are_refused(task, rows, soft, teacher, tmp_path):
    how = change(losses={"hidden": 1.0, "relation": 1.0}, alpha=1.0)
    with pytest.raises(SpecError, match="nothing teaches the student to answer"):
        fit(student(), task, rows, soft, how, validation=rows[:8], work=tmp_path, title="t", teacher=teacher)


# --- several processes


@pytest.mark.parametrize(("parts", "size"), [(1, 16), (2, 16), (4, 16), (6, 12), (4, 5)])
def test_the_rows_of_a_step_are_the_same_for_any_number_of_parts(parts, size):
    lengths = np.random.default_rng(0).integers(1, 60, 9 * size + 3)
    order = ByLength(lengths, size, seed=1)
    order.set_epoch(2)
    whole = [[*order][i : i + size] for i in range(0, len(lengths), size)]
    dealt = [*Parts(order, parts)]
    steps = [dealt[i : i + parts] for i in range(0, len(dealt), parts)]
    assert len(dealt) == len(Parts(order, parts)) == parts * len(whole)
    assert [[*chain(*step)] for step in steps[:-1]] == whole[:-1]
    assert {*chain(*steps[-1])} == {*whole[-1]}
    assert all(steps[-1])
    for i, (step, rows) in enumerate(zip(steps, whole, strict=True)):
        weights = [Parts(order, parts).weight(len(part), i) for part in step]
        assert sum(weights) == pytest.approx(parts)
        if len(rows) >= parts:  # the mean of the parts' weighted means is the step's mean
            means = [weight * np.mean(part) for weight, part in zip(weights, step, strict=True)]
            assert np.mean(means) == pytest.approx(np.mean(rows))


@pytest.fixture(scope="module")
def still() -> dict:
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# Losses of layers are means over tokens, of each part by itself, so they differ a little.
LEARNT = {
    "logits": (1e-3, change(epochs=6, patience=1, losses={"kl": 1.0, "mse": 0.1}, accumulate=2)),
    "layers": (0.1, change(epochs=3, losses={"kl": 1.0, "hidden": 1.0})),
}


def without_shares(point) -> dict:
    return {name: value for name, value in point.items() if not name.startswith("shares/")}


@pytest.mark.parametrize("kind", LEARNT)
def test_two_processes_and_two_passes_learn_what_one_does(kind, task, rows, soft, teacher, still, tmp_path):
    some, (near, how) = rows[:93], LEARNT[kind]
    alone = student(**still)
    alone.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((teacher / "tokenizer.json").read_bytes())
    (tmp_path / "teacher").symlink_to(teacher)
    write_json(tmp_path / "task.json", task.config)
    write_json(tmp_path / "given.json", {"rows": some, "how": how})
    np.save(tmp_path / "soft.npy", soft[:93])
    first, second = run_case("train", tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "16 rows a step" in first.stderr
    assert second.stderr == ""
    options = {"validation": some[:25], "work": tmp_path / "alone", "title": "t", "teacher": teacher}
    curve = fit(alone, task, some, soft[:93], msgspec.structs.replace(how, accumulate=1), **options)
    theirs = json.loads((tmp_path / "curve.json").read_text())
    assert [point.keys() for point in theirs] == [point.keys() for point in curve]
    for point, other in zip(theirs, curve, strict=True):
        assert without_shares(point) == pytest.approx(without_shares(other), rel=near, abs=1e-4)
    weights = torch.load(tmp_path / "weights.pt")
    apart = {name: (value - weights[name]).abs().mean().item() for name, value in alone.state_dict().items()}
    moved = {name: (value - weights[name]).abs().mean().item() for name, value in student(**still).state_dict().items()}
    assert sum(apart.values()) < max(3 * near, 0.01) * sum(moved.values())
    assert not list((tmp_path / "work").glob("*"))


def test_gradients_that_are_computed_again_are_the_same(task, rows, soft, still, tmp_path):
    learned = []
    for again in (False, True):
        model = student(**still)
        how = change(epochs=1, checkpoint_gradients=again)
        fit(model, task, rows, soft, how, validation=rows[:8], work=tmp_path / str(again), title="t")
        assert not model.is_gradient_checkpointing
        learned.append(model.classifier.weight.detach())
    assert torch.equal(*learned)


def test_a_model_that_cannot_compute_layers_again_is_refused(task, rows, soft, tmp_path):
    model = student()
    model.supports_gradient_checkpointing = False
    with pytest.raises(SpecError, match="checkpoint_gradients: models of the family 'bert' don't offer it"):
        fit(model, task, rows, soft, change(checkpoint_gradients=True), validation=[], work=tmp_path, title="t")


@pytest.mark.slow
def test_a_compiled_training_learns_the_same_and_leaves_no_trace(task, rows, soft, still, tmp_path):
    before, learned = set(os.environ), []
    for compiled in (False, True):
        model = student(**still)
        fit(model, task, rows, soft, change(epochs=1, compile=compiled), validation=[], work=tmp_path, title="t")
        learned.append({name: value.numpy() for name, value in model.state_dict().items()})
    assert learned[0].keys() == learned[1].keys()
    assert all(np.abs(learned[0][name] - learned[1][name]).max() < 1e-3 for name in learned[0])
    assert not [name for name in {*os.environ} - before if name.startswith("ACCELERATE_")]
