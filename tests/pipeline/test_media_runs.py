"""The two examples from end to end, on a few of their own rows: run, predict, serve, and other people's loaders."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from serve_process import served
from server import forget_sessions

import kdexport as package
from kdexport import spec
from kdexport.data import read_rows
from kdexport.results import read_report
from kdexport.tasks.inputs.media import bytes_of

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
QUICK = {"bench.rounds": 1, "bench.round_seconds": 0.3, "bench.precision": None, "bench.batch_sizes": []}


def run(name, out, cache, **flags):
    from kdexport.pipeline.run import run as run_pipeline

    os.environ["KDEXPORT_CACHE"] = str(cache)
    run_pipeline(spec.load(ROOT / "examples" / name, QUICK | flags), out)
    return out


def needed(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"shared/data/{name} is not beside the repository")
    return DATA / name


@pytest.fixture(scope="module")
def clothes(tmp_path_factory, cache):
    """The example of images with 600 rows, a teacher of one tenth."""
    import pyarrow.parquet as pq

    data = tmp_path_factory.mktemp("fashion")
    for split, count in (("train", 600), ("test", 150)):
        pq.write_table(pq.read_table(needed("fashion-mnist") / f"{split}.parquet")[:count], data / f"{split}.parquet")
    teacher = smaller("fashion-resnet", tmp_path_factory, hidden_sizes=[16, 32, 64], depths=[1, 1, 1])
    how = {"epochs": 6, "learning_rate": 3e-3, "batch_size": 16}
    flags = {"data.train": str(data), "teacher.model": str(teacher), "teacher.train": how}
    flags |= {"distill.epochs": 10, "distill.batch_size": 16}
    return run("image-classification.yaml", tmp_path_factory.mktemp("run") / "clothes", cache, **flags)


@pytest.fixture(scope="module")
def digits(tmp_path_factory, cache):
    """The example of sound with 270 recordings of three digits, a teacher of one tenth."""
    data = tmp_path_factory.mktemp("digits")
    for split, step in (("train", 3), ("test", 1)):
        (data / split).mkdir()
        with (needed("fsdd") / split / "metadata.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["label"] in "012"][::step]
        with (data / split / "metadata.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["file_name", "label"])
            table.writeheader()
            table.writerows(rows)
        for row in rows:
            shutil.copyfile(DATA / "fsdd" / split / row["file_name"], data / split / row["file_name"])
    teacher = smaller("digits-conv", tmp_path_factory, channels=[16, 32, 64], depth=1, stride=2)
    how = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 16}
    flags = {"data.train": str(data), "teacher.model": str(teacher), "teacher.train": how, "distill.epochs": 24}
    return run("audio-classification.yaml", tmp_path_factory.mktemp("run") / "digits", cache, **flags)


def smaller(teacher, tmp_path_factory, **changes):
    folder = tmp_path_factory.mktemp("teacher") / teacher
    shutil.copytree(ROOT / "examples" / "teachers" / teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("stage_names", "out_features", "out_indices"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def some_files(run, task, tmp_path, count=3):
    suffix = ".png" if task == "image" else ".wav"
    rows = read_rows(run / "data", "test")[:count]
    paths = [tmp_path / f"{i}{suffix}" for i in range(count)]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(bytes_of(row[task]))
    return paths


@pytest.fixture(params=["image", pytest.param("audio", marks=pytest.mark.slow)])
def kind(request):
    return request.param


@pytest.fixture
def finished_run(kind, request):
    return request.getfixturevalue("clothes" if kind == "image" else "digits")


def test_a_run_makes_a_small_student_that_keeps_what_the_teacher_knows(finished_run, kind):
    report = read_report(finished_run / "report.json")
    best = report.variant("student-int8")
    assert best.size_bytes < 200_000
    assert report.variant("teacher-torch").metric.value > 0.5
    assert best.metric.value > 0.4
    assert best.agreement > 0.4
    assert report.variant("student-fp32").max_abs_diff < 1e-4
    assert abs(best.metric.value - report.variant("student-fp32").metric.value) < 0.1
    card = (finished_run / "artifact" / "README.md").read_text()
    assert ("ORTModelForImageClassification" if kind == "image" else "ORTModelForAudioClassification") in card


def test_int8_holds_convolutions(finished_run):
    import onnx

    graph = onnx.load(finished_run / "artifact" / "onnx" / "model_quantized.onnx").graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 5
    assert {weights[makers[node.input[1]].input[0]] for node in convolutions} == {onnx.TensorProto.INT8}
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]


def test_predict_reads_files_and_bytes(finished_run, kind, tmp_path, kdexport):
    paths = some_files(finished_run, kind, tmp_path)
    model = package.load(finished_run)
    answers = model.predict(paths)
    assert model.predict([path.read_bytes() for path in paths])[0].values == pytest.approx(answers[0].values, abs=1e-5)
    lines = kdexport("predict", finished_run, *paths).stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == [answer.label for answer in answers]
    assert json.loads(lines[0])[kind] == str(paths[0])
    (tmp_path / "bad").write_bytes(b"no such thing")
    failed = kdexport("predict", finished_run, tmp_path / "bad")
    assert failed.returncode == 2
    assert f"{tmp_path}/bad is no {'image' if kind == 'image' else 'sound file'}" in " ".join(failed.stderr.split())


@pytest.fixture
def online(monkeypatch):
    """The library refuses to talk to anyone while HF_HUB_OFFLINE is set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    yield
    forget_sessions()


@pytest.mark.usefixtures("online")
def test_hugging_faces_client_is_answered(finished_run, kind, tmp_path):
    paths = some_files(finished_run, kind, tmp_path)
    expected = package.load(finished_run).predict(paths)
    with served(f"small={finished_run}") as server:
        client = InferenceClient(server.url)
        ask = client.image_classification if kind == "image" else client.audio_classification
        for path, answer in zip(paths, expected, strict=True):
            found = ask(path.read_bytes())
            assert found[0].label == answer.label
            assert found[0].score == pytest.approx(answer.score, abs=1e-4)
            assert len(found) == len(answer.labels)
        assert len(ask(paths[0].read_bytes(), top_k=2)) == 2
        with pytest.raises(HfHubHTTPError, match="422"):
            ask(b"no such thing")
        with urlopen(Request(f"{server.url}/invocations", paths[0].read_bytes())) as response:
            assert json.loads(response.read())[0]["label"] == expected[0].label
        with urlopen(server.url) as response:
            assert f"{kind}-classification: an {kind} in" in response.read().decode()
        tensors_are_answered(server, finished_run, kind, expected, paths)


def tensors_are_answered(server, finished_run, kind, expected, paths):
    arrays = package.load(finished_run).task.encode([{kind: path.read_bytes()} for path in paths])
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        described, _ = client.get_model_metadata("small")["inputs"]
        ((name, array),) = arrays.items()
        assert (described["name"], described["datatype"]) == (name, "FP32")
        assert described["shape"] == [-1, *array.shape[1:]]
        tensor = triton.InferInput(name, list(array.shape), "FP32").set_data_from_numpy(array)
        found = client.infer("small", [tensor]).as_numpy("scores")
        np.testing.assert_allclose(found, [answer.values for answer in expected], atol=1e-4)
        wrong = np.ascontiguousarray(array[..., 1:])
        tensor = triton.InferInput(name, list(wrong.shape), "FP32").set_data_from_numpy(wrong)
        with pytest.raises(triton.InferenceServerException, match="must have the shape"):
            client.infer("small", [tensor])


def test_optimum_and_hugging_faces_processors_give_the_same_scores(finished_run, kind, tmp_path, optimum):
    (path,) = some_files(finished_run, kind, tmp_path, 1)
    expected = package.load(finished_run, "fp32").predict([path])[0]
    name = f"ORTModelFor{'Image' if kind == 'image' else 'Audio'}Classification"
    ((label, score),) = optimum(name, finished_run / "artifact", "model.onnx", [str(path)])
    assert (label, score) == (expected.label, pytest.approx(expected.score, abs=1e-3))


def test_a_moved_run_still_finds_its_rows(clothes, tmp_path):
    moved = Path(shutil.copytree(clothes, tmp_path / "moved"))
    row = read_rows(moved / "data", "train")[0]
    assert row["image"].startswith(f"{moved}/data/train.blob#")
    assert bytes_of(row["image"])[:4] == b"\x89PNG"


def test_a_teacher_without_weights_is_trained_from_random_ones(clothes, kdexport):
    data = json.loads((clothes / "report.json").read_text())["spec"]["data"]["train"]
    plan = kdexport(
        "run", "--data", data, "--set", "task=image-classification", "--teacher",
        ROOT / "examples" / "teachers" / "fashion-resnet", "--plan", "--json",
    )  # fmt: skip
    assert "from random weights" in json.loads(plan.stdout)["teacher.train.epochs"]["reason"]
