"""Teachers of vectors of every kind: folders, artifacts, stored vectors, several at once; and what is refused."""

# Fixtures come by import.
# ruff: noqa: F401

import shutil

import msgspec
import numpy as np
import pandas as pd
import pytest
from embedders import write_embedder
from embedding import TASK, data_stage, given, stages, train, write_pairs, write_texts
from teaching import one_line, own_cache, targets_of

import kdexport
from kdexport.data import read_rows
from kdexport.distill import teachers
from kdexport.distill.combine import joined
from kdexport.errors import ModelError, SpecError
from kdexport.models.embedder import Embedder
from kdexport.models.inference import logits_of
from kdexport.tasks import load_task
from kdexport.tasks.vectors import cosines, unit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sentences and pairs; two embedders, of which one is not normalised; the artifact of the first."""
    folder = tmp_path_factory.mktemp("world")
    write_texts(folder)
    write_pairs(folder)
    write_pairs(folder, "many.csv", of_texts=True)
    write_embedder(folder / "one")
    write_embedder(folder / "two", normalize=False, dense=20)
    kdexport.export(folder / "one", folder / "artifact", variants="fp32")
    plain = Embedder.open(folder / "one").encoder
    shutil.copytree(folder / "one", folder / "plain", ignore=shutil.ignore_patterns("modules.json", "1_Pooling"))
    plain.save_pretrained(folder / "plain")
    return folder


def settings(world, teacher, **changes):
    pairs = {"data.test": str(world / "pairs.csv"), "data.problem": "similarity"}
    return given(world / "texts.txt", teacher, **pairs | changes)


def vectors(folder, rows):
    return logits_of(Embedder.open(folder), load_task(folder), list(rows))


# --- folders


def test_soft_targets_are_the_vectors_of_the_folder(world, tmp_path):
    data, teacher, targets = stages(tmp_path, settings(world, world / "two"))
    task = load_task(teacher)
    assert (task.name, task.problem, task.width) == (TASK, "similarity", 20)
    found = targets_of(targets)
    for split, array in found.items():
        expected = vectors(teacher, read_rows(data, split))
        assert task.unpack(array) == pytest.approx(expected, abs=2e-3), split
    assert np.linalg.norm(found["test"].astype(float), axis=1).std() > 0.01  # they are not normalised


def test_a_teacher_of_another_pooling_or_dense_layer_shares_no_soft_targets(world, tmp_path):
    first = stages(tmp_path / "a", settings(world, world / "one"))[2]
    other = stages(tmp_path / "b", settings(world, world / "one", **{"teacher.pooling": "first"}))[2]
    assert np.abs(targets_of(first)["train"] - targets_of(other)["train"]).max() > 0.1


def test_a_plain_encoder_is_pooled_as_the_spec_says(world, tmp_path):
    with pytest.raises(ModelError, match="is a plain encoder, and names no pooling") as error:
        stages(tmp_path / "a", settings(world, world / "plain"))
    assert "teacher.pooling" in one_line(error)
    shutil.rmtree(tmp_path / "a")
    _, teacher, _ = stages(tmp_path / "a", settings(world, world / "plain", **{"teacher.pooling": "last"}))
    assert Embedder.open(teacher).steps.pooling == "last"


def test_a_folder_without_weights_is_not_trained_from_random_ones(world, tmp_path):
    copy = shutil.copytree(world / "one", tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        stages(tmp_path / "run", settings(world, copy))


# --- several


def test_a_cosine_of_joined_vectors_is_the_weighted_mean_of_theirs():
    a, b = (np.random.default_rng(i).normal(size=(2, 30, width)) for i, width in enumerate((8, 5)))
    both = [joined([a[i], 7 * b[i]], [3, 1]) for i in (0, 1)]
    assert both[0].shape == (30, 13)
    assert cosines(*both) == pytest.approx(0.75 * cosines(*a) + 0.25 * cosines(*b), abs=1e-6)
    assert np.linalg.norm(both[0], axis=1) == pytest.approx(np.ones(30))
    assert joined([a[0]], [5.0]) == pytest.approx(a[0])  # one alone stays as it is


def test_several_teachers_are_joined_and_learned_on_their_main_axes(world, tmp_path):
    asked = settings(world, [world / "one", world / "two"], **{"teacher.weights": [1, 3]})
    made = data, teacher, targets = stages(tmp_path, asked)
    found = targets_of(targets)["test"].astype(np.float32)
    rows = list(read_rows(data, "test"))
    one, two = (unit(vectors(folder, rows)) for folder in (teacher, teacher / "1"))
    assert found == pytest.approx(np.concatenate([one * 0.25**0.5, two * 0.75**0.5], axis=1), abs=1e-3)
    student = train(asked, "layers:1", made, tmp_path / "student")
    assert load_task(student).width == 32  # the first teacher's
    assert "PCA" in msgspec.json.decode((student / "training.json").read_bytes())["origin"]


# --- artifacts


def test_an_artifact_teaches_another_model_as_its_folder_does(world, tmp_path):
    asked = settings(world, world / "artifact", **{"student.model": str(world / "two")})
    made = _, teacher, targets = stages(tmp_path / "onnx", asked)
    assert teachers.kind_of_first(teacher) == "onnx"
    own = stages(tmp_path / "torch", settings(world, world / "one"))[2]
    for split, array in targets_of(own).items():
        assert targets_of(targets)[split].astype(np.float32) == pytest.approx(array.astype(np.float32), abs=2e-3)
    student = train(asked, str(world / "two"), made, tmp_path / "student")
    assert load_task(student).width == 32
    assert load_task(student).problem == "similarity"


def test_an_artifact_has_no_weights_to_build_a_student_from(world):
    with pytest.raises(SpecError, match="is built from the teacher's weights, and an ONNX file"):
        settings(world, world / "artifact", **{"student.model": "bag"})
    with pytest.raises(SpecError, match=r"teacher\.pooling has no effect"):
        settings(world, world / "artifact", **{"student.model": str(world / "one"), "teacher.pooling": "mean"})


def test_another_tasks_artifact_is_no_teacher_of_vectors(world, tmp_path, classifier):
    kdexport.export(classifier("single-label"), tmp_path / "artifact", variants="fp32")
    asked = settings(world, tmp_path / "artifact", **{"student.model": str(world / "one")})
    with pytest.raises(ModelError, match="is no artifact for sentence-embedding"):
        stages(tmp_path / "run", asked)


# --- stored


def stored(world, tmp_path, write, train_on="texts.txt"):
    """The settings of a run by stored vectors, its data, and a vector for every row of it by id."""
    file = tmp_path / "vectors.npz"
    asked = settings(world, file, **{"student.model": str(world / "one"), "data.train": str(world / train_on)})
    data = data_stage(tmp_path / "run", asked)
    rows = [row for split in ("train", "validation", "test") for row in read_rows(data, split)]
    contents = {row["text"]: i for i, row in enumerate(rows)}
    every = np.random.default_rng(0).normal(size=(len(rows), 12)).astype(np.float32)
    expected = {row["id"]: every[contents[row["text"]]] for row in rows}
    path = write(file, rows, np.stack([expected[row["id"]] for row in rows]))
    if path:
        asked = msgspec.structs.replace(asked, teacher=msgspec.structs.replace(asked.teacher, model=str(path)))
    return asked, data, expected


def by_id(file, rows, array):
    np.savez(file, train=array, ids_train=[row["id"] for row in rows])


def by_text(file, rows, array, column="embedding"):
    table = pd.DataFrame({"text": [row["text"] for row in rows], column: list(array)})
    table.drop_duplicates("text").to_parquet(file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


def as_logits(file, rows, array):
    return by_text(file, rows, array, "logits")


@pytest.mark.parametrize("write", [by_id, by_text, as_logits])
def test_stored_vectors_find_the_texts_of_pairs_as_well(world, tmp_path, write):
    asked, data, expected = stored(world, tmp_path, write, train_on="many.csv")
    made = _, teacher, targets = stages(tmp_path / "run", asked, data)
    assert load_task(teacher).width == 12
    for split, array in targets_of(targets).items():
        wanted = np.stack([expected[row["id"]] for row in read_rows(data, split)])
        assert array.astype(np.float32) == pytest.approx(wanted, abs=2e-3), split
    student = train(asked, str(world / "one"), made, tmp_path / "student")
    assert load_task(student).width == 12


def test_stored_vectors_of_plain_texts_may_come_in_the_order_of_the_file(world, tmp_path):
    lines = (world / "texts.txt").read_text().splitlines()
    every = np.random.default_rng(0).normal(size=(len(lines), 12)).astype(np.float32)
    np.savez(tmp_path / "vectors.npz", train=every)
    asked = given(world / "texts.txt", tmp_path / "vectors.npz", **{"student.model": str(world / "one")})
    data, _, targets = stages(tmp_path / "run", asked)
    for split, array in targets_of(targets).items():
        wanted = np.stack([every[lines.index(row["text"])] for row in read_rows(data, split)])
        assert array.astype(np.float32) == pytest.approx(wanted, abs=2e-3), split


def in_order(file, rows, array):
    np.savez(file, train=array[:40], test=array[40:64])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (in_order, "of which some are two texts, like many.csv:"),
        (lambda f, rows, a: np.savez(f, train=a[1:], ids_train=[r["id"] for r in rows[1:]]), "has no logits for"),
        (lambda f, rows, a: by_id(f, rows, np.where(np.arange(12) < 1, np.inf, a)), "are not finite"),
        (lambda f, rows, a: np.savez(f, train=a, test=a[:, 1:]), "arrays of different numbers of columns: 11, 12"),
        (lambda f, rows, a: np.savez(f, train=a, labels=list("abcdefghijkl")), "names labels, and vectors have none"),
    ],
)
def test_stored_vectors_that_do_not_fit_are_one_line(world, tmp_path, write, says):
    asked, data, _ = stored(world, tmp_path, write, train_on="many.csv")
    with pytest.raises(ModelError) as error:
        stages(tmp_path / "run", asked, data)
    assert says in one_line(error)


# --- settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher.train.epochs": 2}, "teacher.train has no effect on sentence-embedding"),
        ({"distill.alpha": 0.5}, "distill.alpha: no label teaches sentence-embedding"),
        ({"distill.baseline": False}, "distill.baseline has no effect on sentence-embedding"),
        ({"student.embedding": 64, "student.model": "bag"}, "student.embedding has no effect on sentence-embedding"),
        ({"student.model": "cnn"}, "'cnn' is none for sentence-embedding. Take spread:3, tiny, 3x192 or bag"),
        ({"student.model": "gru:32"}, "'gru:32' is none for sentence-embedding"),
        ({"student.model": ["bag", "cnn"]}, "'cnn' is none for sentence-embedding"),
        ({"distill.loss": "kl"}, "distill.loss: kl is not for data.problem similarity. Take cosine, similarity or mse"),
        ({"export.variants": ["int4"]}, "int4 is none for data.problem similarity"),
        ({"data.problem": "regression"}, "data.problem has no effect on sentence-embedding"),
    ],
)
def test_settings_that_vectors_lack_are_refused_before_any_work(world, changes, says):
    with pytest.raises(SpecError) as error:
        settings(world, world / "one", **changes)
    assert says in one_line(error)


def test_no_more_dimensions_are_asked_for_than_the_teachers_have_together(world, tmp_path):
    with pytest.raises(ModelError, match=r"student\.dimensions is 33, the teacher's vectors have 32"):
        stages(tmp_path / "one", settings(world, world / "one", **{"student.dimensions": 33}))
    stages(tmp_path / "both", settings(world, [world / "one", world / "two"], **{"student.dimensions": 52}))
