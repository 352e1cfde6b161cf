"""Students that embed: their first weights, the losses of vectors, and training that is killed and resumed."""

# Fixtures come by import.
# ruff: noqa: F401

import msgspec
import numpy as np
import pytest
import torch
from embedders import write_embedder
from embedding import SENTENCES, TASK, given, stages, train, write_pairs, write_texts
from teaching import own_cache

from kdexport import spec
from kdexport.distill import train as training
from kdexport.distill.losses import LOGIT_LOSSES, cosine, mse, similarity
from kdexport.distill.student import build_student
from kdexport.distill.targets import SoftTargets, principal_axes
from kdexport.models.embedder import Embedder, Table
from kdexport.models.loading import ModelAndProcessor, open_tokenizer
from kdexport.models.saving import save_model, save_task
from kdexport.tasks import load_task
from kdexport.tasks.vectors import overlap

WHOLE = spec.Student(vocabulary="whole")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_texts(folder)
    write_pairs(folder)
    write_embedder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """The stages of a run without labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return stages(tmp_path_factory.mktemp("run") / "run", given(world / "texts.txt", world / "model"))


def vectors_of(model, folder):
    ids = torch.tensor(load_task(folder).tokenize([{"text": SENTENCES[0]}])[0]["input_ids"])[None]
    with torch.no_grad():
        return model(ids).logits


# --- first weights


def test_a_student_of_every_layer_gives_the_teachers_vectors(made):
    _, teacher, _ = made
    built = build_student(WHOLE, "layers:2", teacher, SENTENCES)
    found, expected = (vectors_of(model, teacher) for model in (built.opened.model, Embedder.open(teacher)))
    assert torch.allclose(found, expected, atol=1e-6)
    assert built.axes is None
    assert not any("pooler" in name for name, _ in built.opened.model.named_parameters())  # which nothing reads


def test_layers_of_a_deeper_teacher_are_spread_over_it(tmp_path):
    from transformers import BertConfig, BertModel

    from kdexport.data import demo
    from kdexport.models.embedder import Steps

    config = BertConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64)
    encoder, tokenizer = BertModel(config, add_pooling_layer=False), open_tokenizer(str(demo.teacher()))
    opened = ModelAndProcessor(Embedder(encoder, Steps()).eval(), tokenizer)
    save_task(opened, 16, [], tmp_path, task=TASK, function="none")
    save_model(opened, tmp_path)
    built = build_student(WHOLE, "spread:3", tmp_path, SENTENCES)
    assert built.origin == "the teacher's layers 0, 2, 5"
    for mine, theirs in zip(built.opened.model.encoder.encoder.layer, (0, 2, 5), strict=True):
        assert torch.equal(mine.output.dense.weight, encoder.encoder.layer[theirs].output.dense.weight)


def test_a_trimmed_vocabulary_changes_no_vector_of_the_corpus(made, tmp_path):
    _, teacher, _ = made
    built = build_student(spec.Student(), "layers:2", teacher, SENTENCES)
    save_task(built.opened, 16, [], tmp_path, task=TASK, function="none")
    assert len(built.token_ids) < 3000  # of 30,522: the words, and every letter
    found = vectors_of(built.opened.model, tmp_path)
    assert torch.allclose(found, vectors_of(Embedder.open(teacher), teacher), atol=1e-6)


def test_a_narrow_student_has_the_teachers_width_by_a_way_back(made):
    _, teacher, targets = made
    built = build_student(spec.Student(vocabulary="whole", start="projections"), "2x16", teacher, SENTENCES, targets)
    model = built.opened.model
    assert model.encoder.config.hidden_size == 16
    assert model.width == 32
    (way_back,) = model.dense
    assert way_back.weight.shape == (32, 16)
    assert torch.allclose(way_back.weight.T @ way_back.weight, torch.eye(16), atol=1e-4)  # axes of unit length


def test_a_bag_weights_the_teachers_vector_of_each_token_by_how_rare_it_is(made):
    _, teacher, targets = made
    built = build_student(WHOLE, "bag", teacher, [*SENTENCES, *["the"] * 500], targets)
    table, tokenizer = built.opened.model.encoder, built.opened.processor
    assert isinstance(table, Table)
    often, seldom, unseen = tokenizer.convert_tokens_to_ids(["the", "judge", "zebra"])
    weight = table.embeddings.weight.detach()
    lengths = weight.norm(dim=1)
    assert lengths[often] < 0.1 * lengths[seldom]
    assert lengths[seldom] < lengths[unseen] == pytest.approx(1.0, abs=1e-4)
    assert not weight[tokenizer.all_special_ids].any()
    ids = torch.tensor([[tokenizer.cls_token_id, seldom, tokenizer.sep_token_id]])
    with torch.no_grad():
        expected = Embedder.open(teacher)(ids).logits[0]
    assert torch.cosine_similarity(weight[seldom], expected, dim=0) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["bag", "layers:1", "2x16"])
def test_dimensions_are_those_of_the_main_axes(made, name):
    _, teacher, targets = made
    built = build_student(spec.Student(dimensions=8, vocabulary="whole"), name, teacher, SENTENCES, targets)
    assert built.opened.model.width == 8
    assert built.axes.shape == (32, 8)
    assert "vectors of 8 dimensions by PCA" in built.origin


def test_the_axes_keep_as_much_of_the_dot_products_as_any_can(made):
    task = load_task(made[1])
    targets = SoftTargets(task, made[2] / "train.npy")
    vectors = targets[:]
    axes, energy = principal_axes(vectors, 8)
    assert axes.T @ axes == pytest.approx(np.eye(8), abs=1e-5)
    values = np.linalg.svd(vectors, compute_uv=False) ** 2
    assert energy == pytest.approx(values[:8].sum() / values.sum(), abs=1e-5)
    on_axes = SoftTargets(task, made[2] / "train.npy", axes=axes)
    assert on_axes[[3, 1]] == pytest.approx(vectors[[3, 1]] @ axes, abs=1e-5)
    assert principal_axes(vectors, 32)[1] == pytest.approx(1.0)


def test_a_bag_learns_two_teachers_whose_vectors_are_short(world, tmp_path):
    asked = given(world / "texts.txt", [world / "model", write_embedder(tmp_path / "other", dense=24)])
    student = train(asked, "bag", stages(tmp_path / "run", asked), tmp_path / "student")
    assert load_task(student).width == 32 + 24


# --- losses


def drawn(width=6, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(9, width))).requires_grad_()


@pytest.mark.parametrize("name", ["cosine", "similarity", "mse"])
def test_a_perfect_student_has_loss_0_and_another_has_more(name):
    teacher = drawn().detach()
    assert LOGIT_LOSSES[name](teacher.clone(), teacher, None, 0.05).item() == pytest.approx(0, abs=1e-9)
    assert LOGIT_LOSSES[name](drawn(seed=1), teacher, None, 0.05).item() > 0.1


@pytest.mark.parametrize("loss", [cosine, similarity, mse])
def test_gradients_of_losses_of_vectors_are_right(loss):
    teacher = drawn(seed=1).detach()
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher, None, 0.5), [drawn()])


def test_cosines_do_not_see_lengths_and_turned_vectors_are_as_similar():
    teacher = drawn().detach()
    assert cosine(7 * teacher, teacher, None, 1.0).item() == pytest.approx(0, abs=1e-9)
    assert cosine(-teacher, teacher, None, 1.0).item() == pytest.approx(2)
    turned = teacher @ torch.linalg.qr(drawn(seed=2).detach()[:6])[0]
    assert similarity(3 * turned, teacher, None, 0.05).item() == pytest.approx(0, abs=1e-9)
    assert cosine(turned, teacher, None, 0.05).item() > 0.1
    wider = torch.cat([teacher, torch.zeros(9, 2)], dim=1)
    assert similarity(wider, teacher, None, 0.05).item() == pytest.approx(0, abs=1e-9)


def test_a_batch_of_one_teaches_no_similarity_and_breaks_nothing():
    student = drawn()
    loss = similarity(student[:1], drawn(seed=1)[:1].detach(), None, 0.05)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


# --- training


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bag", {"student.vocabulary": "whole"}),
        ("2x16", {"student.dimensions": 8, "distill.loss": {"cosine": 1.0, "similarity": 0.5}}),
        ("layers:1", {"distill.loss": {"cosine": 1.0, "hidden": 0.1}}),
    ],
)
def test_training_brings_a_student_nearer_to_its_teacher(world, made, tmp_path, name, changes):
    more = {"distill.epochs": 12, "distill.learning_rate": 3e-3}
    student = train(given(world / "texts.txt", world / "model", **more | changes), name, made, tmp_path / "student")
    curve = msgspec.json.decode((student / "training.json").read_bytes())["curve"]
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    task = load_task(student)
    assert np.load(student / "reference.npy").shape[1] == task.width == changes.get("student.dimensions", 32)
    test = np.load(made[2] / "test.npy").astype(np.float32)
    found = np.load(student / "reference.npy")[: len(test)]
    assert overlap(found, test).mean() > 10 / (len(test) - 1)  # more than by chance


class Killed(BaseException):
    """Stands for a kill: nothing in the training handles it."""


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")
@pytest.mark.parametrize("name", ["bag", "2x16"])
def test_a_killed_training_ends_as_one_that_was_not(world, made, tmp_path, name, monkeypatch):
    from kdexport.distill import monitor

    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", 0.0)
    asked = given(world / "texts.txt", world / "model", **{"student.dimensions": 8})
    whole = train(asked, name, made, tmp_path / "whole")

    def on_step_end(self, args, state, control, **_):
        if state.global_step == state.max_steps - 1:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor.Watch, "on_step_end", on_step_end)
        with pytest.raises(Killed):
            train(asked, name, made, tmp_path / "killed")
    again = train(asked, name, made, tmp_path / "killed")
    for file in ("training.json", "reference.npy", "model.safetensors", "modules.json"):
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file
