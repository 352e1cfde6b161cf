"""An artifact from anybody: whatever its files say, it is loaded or refused in one line, and reads no other file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.helper as helper
import pytest
from limits import assert_cheap, cost_of
from onnx import TensorProto
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import kdexport
from kdexport.errors import ArtifactError
from kdexport.files import hash_file, write_json
from kdexport.runtime import artifact
from kdexport.runtime.predictor import golden_answers
from kdexport.serve.registry import Models
from kdexport.tasks import load_task
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig

TEXT, IMAGE, AUDIO = "text-classification", "image-classification", "audio-classification"
TASKS = {
    TEXT: TaskConfig(
        task=TEXT, labels=["no", "yes", "so"], inputs=["input_ids", "attention_mask"], max_length=16, pad_id=1
    ),
    IMAGE: TaskConfig(
        task=IMAGE,
        labels=["no", "yes", "so"],
        inputs=["pixel_values"],
        image=ImageConfig(resize=[8, 8], mean=[0.5] * 3, std=[0.5] * 3),
    ),
    AUDIO: TaskConfig(
        task=AUDIO, labels=["no", "yes", "so"], inputs=["input_values"], audio=AudioConfig(rate=8000, length=800)
    ),
}
WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "a", "word", "play"]


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B", [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(path))


def write_model(path: Path, task: str, classes: int = 3, named: bool = False) -> None:
    """A graph without meaning; `named` leaves the number of its logits open."""
    draw = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> TensorProto:
        return onnx.numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name)

    value, node = helper.make_tensor_value_info, helper.make_node
    match task:
        case "text-classification":
            inputs = [value(name, TensorProto.INT64, ["b", "t"]) for name in TASKS[task].inputs]
            nodes = [
                node("Gather", ["w", "input_ids"], ["x"]),
                node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
                node("Unsqueeze", ["m", "last"], ["m3"]),
                node("Mul", ["x", "m3"], ["y"]),
                node("ReduceMean", ["y"], ["logits"], axes=[1], keepdims=0),
            ]
            initial = [
                weights("w", len(WORDS), classes),
                helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
            ]
        case "image-classification":
            inputs = [value("pixel_values", TensorProto.FLOAT, ["b", "c", "h", "w"])]
            nodes = [
                node("ReduceMean", ["pixel_values"], ["x"], axes=[2, 3], keepdims=0),
                node("MatMul", ["x", "w"], ["logits"]),
            ]
            initial = [weights("w", 3, classes)]
        case _:
            inputs = [value("input_values", TensorProto.FLOAT, ["b", "t"])]
            nodes = [
                node("ReduceMax", ["input_values"], ["x"], axes=[1], keepdims=1),
                node("MatMul", ["x", "w"], ["logits"]),
            ]
            initial = [weights("w", 1, classes)]
    output = value("logits", TensorProto.FLOAT, ["b", "c" if named else classes])
    graph = helper.make_graph(nodes, "g", inputs, [output], initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A whole artifact of each task, with golden answers."""
    made = {}
    for task, config in TASKS.items():
        student, out = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("packed")
        write_json(student / "task.json", config)
        write_json(student / "config.json", {"id2label": dict(enumerate(config.labels))})
        if task == TEXT:
            write_tokenizer(student / "tokenizer.json")
        write_model(student / "model.onnx", task)
        golden = golden_answers(load_task(student), {"fp32": student / "model.onnx"})
        artifact.pack(student, {"fp32": (student / "model.onnx", "plain")}, "fp32", {"by": 1.0}, out, golden)
        (out / artifact.CARD).write_text("# card")
        made[task] = out
    return made


@pytest.fixture
def copy_of(packed, tmp_path):
    return lambda task: Path(shutil.copytree(packed[task], tmp_path / "artifact"))


def reseal(folder: Path, change=lambda manifest: None) -> None:
    """Change the manifest, and make every checksum right again."""
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    for name in manifest["files"]:
        manifest["files"][name] = hash_file(folder / name)
    for variant in manifest["variants"].values():
        variant["sha256"] = hash_file(folder / variant["file"])
    change(manifest)
    path.write_text(json.dumps(artifact.sealed(manifest)))


def serve(folder: Path) -> str:
    """Load it as the server does; the card."""
    return Models({"m": (folder, None)}, 8, 512).load("m").card


def refused(folder: Path, match: str = ".") -> None:
    """Both ways in refuse it in one line."""
    for load in (kdexport.load, serve):
        with pytest.raises(ArtifactError, match=match) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2100


@pytest.mark.parametrize("task", TASKS)
def test_an_artifact_as_it_was_packed_is_loaded(copy_of, task):
    folder = copy_of(task)
    assert kdexport.load(folder).task.labels == ["no", "yes", "so"]
    assert serve(folder) == "# card"
    reseal(folder)
    assert serve(folder) == "# card"


# --- values


BIG = 10**12
VALUES = {
    TEXT: [
        {"max_length": 0}, {"max_length": -5}, {"max_length": 10**9}, {"max_length": "16"},
        {"pad_id": BIG}, {"pad_id": -1}, {"pad_id": 1000}, {"pad_type_id": BIG}, {"padding_side": "up"},
        {"labels": []}, {"labels": ["a"]}, {"labels": ["no", "yes"]}, {"labels": ["no", "yes", "so", "then"]},
        {"labels": ["so", "yes", "no"]}, {"labels": [1, 2, 3]}, {"labels": None},
        {"inputs": []}, {"inputs": ["input_ids"]}, {"inputs": ["input_ids", "attention_mask", "bbox"]},
        {"inputs": ["attention_mask", "token_type_ids"]}, {"inputs": ["input_ids"] * 1000},
        {"task": IMAGE}, {"task": "causal-lm"}, {"task": "token-classification"}, {"task": "x" * 10**6}, {"task": None},
        {"function": "tanh"}, {"kept": -1}, {"kept": BIG}, {"end_id": BIG}, {"end_id": 10**30}, {"image": []},
    ],
    IMAGE: [
        {"image": None}, {"inputs": []}, {"inputs": ["pixel_values", "input_ids"]}, {"labels": []},
        *({"image": value} for value in (
            {"resample": 99}, {"resample": -1}, {"std": [0.0] * 3}, {"std": []}, {"std": [1.0, 1.0]},
            {"mean": [0.0] * 4}, {"mean": [1e300] * 3}, {"resize": 0}, {"resize": -1}, {"resize": 2**31},
            {"resize": 50_000}, {"resize": [8]}, {"resize": [0, 8]}, {"resize": [8, 8, 8]},
            {"resize": [50_000, 50_000]}, {"resize": None}, {"resize": 8},
            {"crop": [0, 0]}, {"crop": [BIG, 8]}, {"channels": 4}, {"channels": 0}, {"channels": -3}, {"channels": 2},
            {"channels": 10**10}, {"scale": 0}, {"scale": 1e300},
        )),
    ],
    AUDIO: [
        {"audio": None},
        *({"audio": value} for value in (
            {"rate": 0}, {"rate": -8000}, {"rate": 10**10}, {"length": 0}, {"length": -1}, {"length": 10**10},
            {"mels": 10**7}, {"mels": -1}, {"length": 2**24, "mels": 512}, {"std": 0.0}, {"mels": 20},
        )),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "values"), [(task, values) for task, many in VALUES.items() for values in many], ids=lambda v: str(v)[:50]
)
@pytest.mark.parametrize("has_golden", [True, False])
def test_a_value_that_makes_no_sense_is_refused_in_one_line(copy_of, task, values, has_golden):
    folder = copy_of(task)

    def change(manifest):
        for key, value in values.items():
            old = manifest["task"].get(key)
            manifest["task"][key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
        if not has_golden:
            del manifest["files"]["golden.json"]
            (folder / "golden.json").unlink()

    reseal(folder, change)
    refused(folder)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "9" * 5000, "[" * 2000])
def test_numbers_that_json_can_write_and_nobody_can_read_are_refused(copy_of, text):
    folder = copy_of(TEXT)
    content = (folder / artifact.MANIFEST).read_text().replace('"max_length": 16', f'"max_length": {text}')
    assert text in content
    (folder / artifact.MANIFEST).write_text(content)
    refused(folder)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("task", TASKS)
def test_logits_of_another_number_than_the_labels_are_refused(copy_of, task, classes, named):
    folder = copy_of(task)
    write_model(folder / "onnx/model.onnx", task, classes, named)
    (folder / "golden.json").unlink()
    reseal_without_golden(folder)
    refused(folder, f"{classes}.* 3 labels")


def reseal_without_golden(folder: Path) -> None:
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["files"].pop("golden.json", None)
    path.write_text(json.dumps(manifest))
    reseal(folder)
    (folder / artifact.GOLDEN).unlink(missing_ok=True)


def test_a_recommended_variant_that_is_not_there_is_named(copy_of):
    folder = copy_of(TEXT)
    reseal(folder, lambda manifest: manifest.update(recommended="int8"))
    refused(folder, "recommends a variant that it lacks: 'int8'. It has: fp32")
    assert kdexport.load(folder, "fp32")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {f"onnx/{'./' * i}model.onnx": "0" * 64 for i in range(100)}},
        {"files": {"tokenizer.json": "short"}},
        {"files": {"x" * 10_000: "0" * 64}},
        {"files": []},
        {"variants": {}},
        {"variants": {"fp32": {}}},
        {"variants": None},
        {"task": None},
        {"recommended": None},
        {"schema": 2},
        {"schema": "1"},
        {"sha256": 5},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_manifest_of_other_kinds_of_values_is_refused(copy_of, change):
    folder = copy_of(TEXT)
    manifest = json.loads((folder / artifact.MANIFEST).read_bytes()) | change
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest if "sha256" in change else artifact.sealed(manifest)))
    refused(folder)


def test_what_real_models_have_is_allowed():
    shapes = {"mean": [0.485] * 3, "std": [0.229] * 3}
    for made in (
        ImageConfig(resize=256, crop=[224, 224], resample=3, **shapes),
        ImageConfig(resize=[4096, 4096], **shapes),
        ImageConfig(channels=1, resize=None, crop=[28, 28], scale=1.0, mean=[33.3], std=[78.6]),
        AudioConfig(rate=192_000, length=120 * 192_000),
        AudioConfig(rate=16_000, length=1024, mels=512, mean=-4.27, std=4.57),
        TaskConfig(task=TEXT, labels=["x"] * 21_843, inputs=["input_ids"], max_length=262_144, padding_side="left"),
        TaskConfig(task="causal-lm", labels=[], inputs=["input_ids"], max_length=131_072, kept=64, end_id=151_643),
    ):
        kind = type(made)
        assert msgspec.convert(msgspec.to_builtins(made), kind) == made


# --- checksums of labels and columns


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["task"]["labels"].reverse(),
        lambda manifest: manifest["task"]["inputs"].reverse(),
        lambda manifest: manifest["task"].update(max_length=8),
        lambda manifest: manifest["made"].update(by="somebody"),
        lambda manifest: manifest["files"].pop("tokenizer.json"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(copy_of, change):
    folder = copy_of(TEXT)
    manifest = json.loads((folder / artifact.MANIFEST).read_bytes())
    assert manifest["sha256"]
    change(manifest)
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    refused(folder, "kdexport.json was changed after it was packed")


def test_a_manifest_that_was_only_laid_out_otherwise_is_the_same(copy_of):
    folder = copy_of(TEXT)
    manifest = json.loads((folder / artifact.MANIFEST).read_bytes())
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest, sort_keys=True))
    assert serve(folder)


def test_older_manifests_have_no_checksum_and_their_labels_are_those_of_the_config(copy_of):
    folder = copy_of(TEXT)
    manifest = json.loads((folder / artifact.MANIFEST).read_bytes())
    del manifest["sha256"]
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    assert serve(folder)
    manifest["task"]["labels"].reverse()
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    refused(folder, "other labels than its config.json")


@pytest.mark.parametrize(
    ("content", "loads"),
    [
        ("{}", True), ('{"id2label": null}', True),
        ('{"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}', True),
        ('{"id2label": {"2": "so", "0": "no", "1": "yes"}}', True), ('{"id2label": {"0": "no", "1": "yes"}}', False),
        ('{"id2label": {"a": "no"}}', False), ('{"id2label": []}', True), ('{"id2label": [1]}', False), ("[]", False),
        ("[" * 100_000, False), ("", False), ("\ud800", False),
    ],
)  # fmt: skip
def test_the_labels_of_the_config(copy_of, content, loads):
    folder = copy_of(TEXT)
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    reseal(folder)
    if loads:
        assert serve(folder)
    else:
        refused(folder, r"config\.json")


# --- golden.json


def with_golden(folder: Path, change) -> None:
    path = folder / artifact.GOLDEN
    golden = json.loads(path.read_bytes())
    golden = change(golden) or golden
    path.write_text(golden if isinstance(golden, str) else json.dumps(golden))
    reseal(folder)


@pytest.mark.parametrize("task", [IMAGE, AUDIO])
@pytest.mark.parametrize("value", ["/dev/zero", "/etc/passwd", "/nonexistent/secret", "FIFO", "a#0+1", "", "data:,x"])
def test_golden_rows_name_no_files_and_do_not_tell_which_there_are(copy_of, task, value, tmp_path):
    folder = copy_of(task)
    if value == "FIFO":
        os.mkfifo(tmp_path / "pipe")
        value = str(tmp_path / "pipe")
    reads = "image" if task == IMAGE else "audio"
    with_golden(folder, lambda golden: golden["rows"].__setitem__(0, {reads: value}))
    with pytest.raises(ArtifactError) as caught:
        serve(folder)
    assert str(caught.value) == f"{folder}/golden.json has a row that holds no {reads}"


def change_rows(rows):
    return lambda golden: golden.update(rows=rows)


def change_logits(logits):
    return lambda golden: golden["logits"].update(fp32=logits)


ROW = [0.0, 0.0, 0.0]
GOLDEN = {
    "no rows": lambda g: (g.update(rows=[]), g["logits"].update(fp32=[]))[-1],
    "many rows": lambda g: (g.update(rows=[{"text": "a"}] * 65), g["logits"].update(fp32=[ROW] * 65))[-1],
    "other keys": change_rows([{"text": "a", "image": "/etc/passwd"}]),
    "no text": change_rows([{"words": "a"}]),
    "another kind of row": change_rows([["a"]]),
    "another kind of value": change_rows([{"text": ["a"]}]),
    "ragged": change_logits([ROW, [0.0]]),
    "ragged in length": change_logits([ROW] * 9 + [[0.0, 0.0]]),
    "flat": change_logits(ROW),
    "of words": change_logits([["x"] * 3] * 10),
    "of nothing": change_logits([[None] * 3] * 10),
    "of mappings": change_logits([[{}] * 3] * 10),
    "a mapping": change_logits({}),
    "null": change_logits(None),
    "huge": change_logits([[10**400] * 3] * 10),
    "not finite": lambda g: json.dumps(g | {"logits": {"fp32": [ROW] * 9 + [[1e300] * 3]}}).replace("1e+300", "1e999"),
    "deep": lambda g: json.dumps(g | {"logits": {"fp32": 7}}).replace("7", "[" * 900 + "]" * 900),
    "wide": change_logits([[0.0] * 100_000] * 10),
    "no JSON": lambda g: "garbage",
    "no object": lambda g: [1],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_answers_of_anything_are_refused_in_one_line(copy_of, kind):
    folder = copy_of(TEXT)
    with_golden(folder, GOLDEN[kind])
    with pytest.raises(ArtifactError, match="golden") as caught:
        serve(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "%%%", "aGVsbG8=", "iVBORw0KGgo="])
def test_golden_media_that_are_broken_are_refused_in_one_line(copy_of, content):
    folder = copy_of(IMAGE)
    with_golden(folder, lambda golden: golden["rows"].__setitem__(0, {"image": f"data:;base64,{content}"}))
    with pytest.raises(ArtifactError) as caught:
        serve(folder)
    assert "\n" not in str(caught.value)


def test_large_answers_are_packed_for_fewer_rows(packed, tmp_path, monkeypatch):
    task = load_task(packed[TEXT])
    monkeypatch.setattr("kdexport.runtime.predictor._MOST_NUMBERS", 8)
    golden = golden_answers(task, {"fp32": packed[TEXT] / "onnx/model.onnx"})
    assert len(golden.rows) == len(golden.logits["fp32"]) == 2


# --- files


CHILD = """
import kdexport
from kdexport.errors import ArtifactError
from kdexport.serve.registry import Models
"""
LOAD = """
try:
    result = [Models({"m": (__import__("pathlib").Path(arguments[0]), None)}, 8, 512).load("m").card[:20]]
except ArtifactError as error:
    result = str(error)
"""


def change_file(path: Path, how: str) -> None:
    path.unlink()
    match how:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "latin-1":
            path.write_bytes("# Übersicht".encode("latin-1"))
        case "huge":
            path.write_text("# card")
            os.truncate(path, 1 << 30)


@pytest.mark.parametrize("how", ["pipe", "folder", "latin-1", "huge", "missing"])
def test_a_card_never_keeps_a_model_from_serving(copy_of, how):
    folder = copy_of(TEXT)
    change_file(folder / artifact.CARD, how)
    cost = cost_of(CHILD, LOAD, folder, timeout=30)
    assert isinstance(cost.result, list)
    assert_cheap(cost, seconds=3)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("kdexport.json", True),
        ("golden.json", True),
        ("golden.json", False),
        ("tokenizer.json", True),
        ("tokenizer.json", False),
        ("config.json", True),
    ],
)
@pytest.mark.parametrize("how", ["pipe", "folder", "huge"])
def test_a_file_that_is_none_or_huge_is_refused_without_waiting_for_it(copy_of, name, how, listed):
    folder = copy_of(TEXT)
    if not listed:
        reseal(folder, lambda manifest: manifest["files"].pop(name, None))
    change_file(folder / name, how)
    cost = cost_of(CHILD, LOAD, folder, timeout=30)
    assert isinstance(cost.result, str)
    assert name in cost.result
    assert "\n" not in cost.result
    assert_cheap(cost, seconds=3)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin"])
@pytest.mark.parametrize("name", ["kdexport.json", "golden.json", "tokenizer.json", "README.md"])
def test_a_device_is_not_read(copy_of, name, device):
    folder = copy_of(TEXT)
    (folder / name).unlink()
    (folder / name).symlink_to(device)
    with pytest.raises(ArtifactError, match=r"outside of it|no file|can't be read"):
        serve(folder)


# --- what a graph asks for


def test_a_graph_that_wants_more_memory_than_there_is_is_refused(copy_of):
    folder = copy_of(TEXT)
    value, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Shape", ["input_ids"], ["s"]),
        node("Mul", ["s", "large"], ["many"]),
        node("ConstantOfShape", ["many"], ["x"]),
        node("ReduceMean", ["x"], ["y"], keepdims=0),
        node("Add", ["y", "zeros"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, TensorProto.INT64, ["b", "t"]) for name in TASKS[TEXT].inputs],
        [value("logits", TensorProto.FLOAT, ["b", 3])],
        [
            helper.make_tensor("large", TensorProto.INT64, [2], [1_000_000, 1_000_000]),
            helper.make_tensor("zeros", TensorProto.FLOAT, [1, 3], [0, 0, 0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (folder / "onnx/model.onnx").write_bytes(model.SerializeToString())
    reseal_without_golden(folder)
    refused(folder, "can't be loaded")


def test_what_an_error_quotes_is_cut_and_printable(copy_of):
    folder = copy_of(TEXT)
    reseal(folder, lambda manifest: manifest.update(recommended="\x1b[2J\x9b\u202e"))
    with pytest.raises(ArtifactError) as caught:
        serve(folder)
    assert str(caught.value).isprintable()
    reseal(folder, lambda manifest: manifest["task"].update(function="x" * 10**6))
    refused(folder, "Invalid enum value")


def test_whatever_a_load_raises_is_one_line_and_a_stop_is_a_stop(copy_of, monkeypatch):
    folder = copy_of(TEXT)

    class PanicException(BaseException):
        """What Rust raises."""

    for error in (MemoryError(), RecursionError("deep"), KeyError("x"), PanicException("called unwrap\non None")):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("kdexport.runtime.predictor.Predictor.prove", fail)
            refused(folder, "can't be loaded")
    with monkeypatch.context() as patch:
        patch.setattr("kdexport.runtime.predictor.Predictor.prove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            serve(folder)
