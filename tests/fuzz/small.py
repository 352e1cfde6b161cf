"""Small artifacts that are made in a moment (real tokenizer, weights that mean nothing), and a server of them."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdexport.data import demo
from kdexport.files import write_json
from kdexport.runtime import artifact
from kdexport.runtime.predictor import golden_answers
from kdexport.serve.app import App
from kdexport.serve.registry import Models
from kdexport.serve.server import start_threads
from kdexport.serve.settings import Settings
from kdexport.tasks import load_task
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig

TEXT_INPUTS = ["input_ids", "attention_mask"]
LABELS = ["a", "b", "c", "d"]


def configs(frames: int = 498) -> dict[str, TaskConfig]:
    """Return a task of each kind that reads other input than the rest; `frames` are those of speech, 10 ms each."""
    image = ImageConfig(channels=3, resize=256, crop=[224, 224], mean=[0.5] * 3, std=[0.5] * 3)
    audio = AudioConfig(rate=16_000, length=998, mels=64, mean=-4.0, std=4.0)
    speech = AudioConfig(rate=16_000, length=frames, mels=40, mean=-4.0, std=4.0, steps=frames)
    tags, characters = ["O", "B-x", "I-x", "B-y"], ["<pad>", " ", *"adeinorst"]
    return {
        "text": TaskConfig(task="text-classification", labels=LABELS, inputs=TEXT_INPUTS, max_length=128),
        "tags": TaskConfig(task="token-classification", labels=tags, inputs=TEXT_INPUTS, max_length=64),
        "image": TaskConfig(task="image-classification", labels=LABELS, inputs=["pixel_values"], image=image),
        "audio": TaskConfig(task="audio-classification", labels=LABELS, inputs=["input_values"], audio=audio),
        "speech": TaskConfig(
            task="automatic-speech-recognition",
            labels=characters,
            inputs=["input_values"],
            function="none",
            audio=speech,
        ),
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
    """The sum (of tags: each token; of pictures and sound: the mean; of speech: each frame) times weights."""
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
    elif config.audio and config.audio.steps:
        inputs = [helper.make_tensor_value_info("input_values", TensorProto.FLOAT, ["batch", "frames", "mels"])]
        random = np.random.default_rng(0).normal(size=(config.audio.mels, len(config.labels)))
        random -= random.mean(axis=0)
        random[:, 1] = -0.1  # silence, the same low energy in all bands, is a space
        constants[0] = numpy_helper.from_array(random.astype(np.float32), "weights")
        nodes.append(helper.make_node("Identity", ["input_values"], ["sum"]))
        shape.append("steps")
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


class Server:
    """The application with five small models, asked without a socket."""

    def __init__(self, frames: int = 498) -> None:
        home = tempfile.TemporaryDirectory(prefix="kdexport-fuzz-")
        atexit.register(home.cleanup)
        named = {name: (pack(config, Path(home.name) / name), None) for name, config in configs(frames).items()}
        self.loop = asyncio.new_event_loop()
        models = Models(named, 8, 2048)
        self.app = App(models, Settings(access_log="off", threads=1))
        self.loop.run_until_complete(self._start(models, list(named)))

    async def _start(self, models: Models, names: list[str]) -> None:
        versions = [models.load(name) for name in names]
        start_threads(self.app, versions, lambda error: print("a thread died", error))
        self.app.loaded = True

    def post(self, path: str, body: bytes, *headers: tuple[bytes, bytes]) -> int:
        """Ask, and return the status; the server may refuse, and must not fail."""
        status = self.loop.run_until_complete(self._post(path, body, headers))
        assert status < 500 or status in (503, 504), status
        return status

    async def _post(self, path: str, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> int:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": path, "headers": [(b"host", b"127.0.0.1"), *headers],
            "http_version": "1.1", "client": ("127.0.0.1", 1), "query_string": b"",
        }  # fmt: skip
        await self.app(scope, receive, send)
        return int(sent[0]["status"])
