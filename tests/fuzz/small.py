"""Artifacts that are made in a moment, for fuzzing: real tokenizer and graphs, weights that mean nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdexport import artifact
from kdexport.data import demo
from kdexport.files import write_json
from kdexport.predictor import golden_answers
from kdexport.tasks import load_task
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig

TEXT_INPUTS = ["input_ids", "attention_mask"]
LABELS = ["a", "b", "c", "d"]


def configs() -> dict[str, TaskConfig]:
    """Return a task of each kind that reads other input than the rest."""
    image = ImageConfig(channels=3, resize=256, crop=[224, 224], mean=[0.5] * 3, std=[0.5] * 3)
    audio = AudioConfig(rate=16_000, length=998, mels=64, mean=-4.0, std=4.0)
    tags = ["O", "B-x", "I-x", "B-y"]
    return {
        "text": TaskConfig(task="text-classification", labels=LABELS, inputs=TEXT_INPUTS, max_length=128),
        "tags": TaskConfig(task="token-classification", labels=tags, inputs=TEXT_INPUTS, max_length=64),
        "image": TaskConfig(task="image-classification", labels=LABELS, inputs=["pixel_values"], image=image),
        "audio": TaskConfig(task="audio-classification", labels=LABELS, inputs=["input_values"], audio=audio),
    }


def pack(config: TaskConfig, folder: Path) -> Path:
    """Write an artifact for a task into a new folder, and return it."""
    student, out = folder / "student", folder / "artifact"
    for made in (student, out):
        made.mkdir(parents=True)
    write_json(student / "task.json", config)
    names = {str(i): label for i, label in enumerate(config.labels)}
    write_json(student / "config.json", {"model_type": "bert", "id2label": names})
    if config.max_length:
        shutil.copyfile(demo.teacher() / "tokenizer.json", student / "tokenizer.json")
    onnx.save(_graph(config), folder / "model.onnx")
    golden = golden_answers(load_task(student), {"fp32": folder / "model.onnx"})
    artifact.pack(student, {"fp32": (folder / "model.onnx", "plain")}, "fp32", {"by": "a test"}, out, golden)
    (out / "README.md").write_text("# A model\n", encoding="utf-8")
    return out


def _graph(config: TaskConfig) -> onnx.ModelProto:
    """The sum (of tags: each token; of pictures and sound: the mean) times a row of weights."""
    weights = np.linspace(-1e-3, 1e-3, len(config.labels), dtype=np.float32)[None]
    constants = [numpy_helper.from_array(weights, "weights")]
    nodes, shape = [], ["batch"]
    if config.max_length:
        inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"]) for n in config.inputs]
        nodes += [helper.make_node("Mul", config.inputs, ["read"]), _node("Cast", "read", "x", to=TensorProto.FLOAT)]
        constants.append(numpy_helper.from_array(np.array([-1]), "last"))
        if config.task == "token-classification":
            shape.append("tokens")
            nodes.append(helper.make_node("Unsqueeze", ["x", "last"], ["sum"]))
        else:
            nodes.append(helper.make_node("ReduceSum", ["x", "last"], ["sum"], keepdims=1))
    else:
        sizes = ["batch", 3, 224, 224] if config.image else ["batch", "frames", "mels"]
        inputs = [helper.make_tensor_value_info(config.inputs[0], TensorProto.FLOAT, sizes)]
        nodes += [_node("Flatten", config.inputs[0], "x", axis=1)]
        constants.append(numpy_helper.from_array(np.array([-1]), "last"))
        nodes.append(helper.make_node("ReduceMean", ["x", "last"], ["sum"], keepdims=1))
    nodes.append(helper.make_node("MatMul", ["sum", "weights"], ["logits"]))
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, len(config.labels)])
    graph = helper.make_graph(nodes, "small", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _node(kind: str, given: str, made: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, [given], [made], **attributes)
