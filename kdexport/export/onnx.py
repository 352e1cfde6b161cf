"""PyTorch → ONNX, by torch's own exporters: TorchScript's, and dynamo's where that fails.

ONNX Runtime's fusions know the graphs of TorchScript with eager attention: docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedModel, masking_utils

from kdexport.errors import ModelError, first_line
from kdexport.models import LINE_5
from kdexport.models.caches import pairs_of, read_after
from kdexport.models.inference import PADDING_TOLERANCE, logits_of, padding_effect
from kdexport.models.registry import Dimensions, dimensions, open_trained
from kdexport.runtime.predictor import POSITIONS, Predictor
from kdexport.runtime.transcription import PAST, PRESENT
from kdexport.tasks import load_task
from kdexport.tasks.base import Task, reads_texts

OPSET = 18
# Of a graph's logits, relative to the largest. `export.verify` judges strictly; this finds graphs of another function.
_TOLERANCE = 1e-3
# Families whose graphs ONNX Runtime's `bert` fusions know.
_BERT_LIKE = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "camembert", "mpnet", "albert"}
# Lengths of the traced example: all differ, and none is 1, which the exporter would take for a constant.
_ROWS, _READ, _BEFORE = 2, 6, 3
# Axes that tracing leaves free and that a model reads at one size.
_FIXED = {"num_channels", "height", "width"}


class Graph(NamedTuple):
    """A graph's example inputs, in order; the names of its outputs; and the dynamic axes of both."""

    inputs: dict[str, Tensor]
    outputs: list[str]
    axes: dict[str, dict[int, str]]


class _Positional(nn.Module):
    """A model with its graph's inputs as positional arguments, and its outputs as a tuple."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], also: Sequence[str] = ()) -> None:
        super().__init__()
        self._model, self._names, self._also = model, names, also

    def forward(self, *values: Tensor) -> Any:
        given = dict(zip(self._names, values, strict=True))
        past = [value for name, value in given.items() if name.startswith(PAST)]
        inputs = {name: value for name, value in given.items() if not name.startswith(PAST)}
        if not past:
            found = self._model(**inputs)
            return (*(found[name] for name in self._also), found.logits) if self._also else found.logits
        pairs = list(zip(past[::2], past[1::2], strict=True))
        logits, cache = read_after(self._model, DynamicCache(pairs), **inputs)
        return logits, *(tensor for pair in pairs_of(cache) for tensor in pair)


def export_onnx(student: Path, file: Path, exporters: Sequence[str] = ("torchscript", "dynamo")) -> str:
    """Write a student, a Hugging Face folder with `task.json`, as one fp32 ONNX file with dynamic axes.

    Returns:
        The exporter that wrote it: the first that can, and whose graph does what the model does.

    Raises:
        ModelError: none can write this model.
    """
    task = load_task(student)
    model = open_trained(student).eval()
    if reads_texts(task) and not task.generates and (effect := padding_effect(model, task)) > PADDING_TOLERANCE:
        raise ModelError(
            f"{model.config.model_type} models score a text otherwise beside longer ones, by {effect:.1%} of a logit",
            "Take a student of another family, or bag, cnn, gru or encoder",
        )
    if LINE_5:  # SDPA's graphs fuse no attention, and measured slower; 4.57's masks are fused as they are
        model.set_attn_implementation("eager")
    problems = []
    for name in exporters:
        try:
            _EXPORTERS[name](model, task, file)
            if (difference := _difference(model, task, file)) <= _TOLERANCE:
                return name
            problems.append(f"{name}'s graph differs from it by {difference:.1e}")
        except Exception as error:  # exporters raise whatever a model's code or torch raises
            problems.append(first_line(error))
    file.unlink(missing_ok=True)
    raise ModelError(
        f"{model.config.model_type} models can't be exported to ONNX: {problems[0]}",
        "Take a student of another family, or bag, cnn, gru or encoder",
    )


def fusable(student: Path) -> Dimensions | None:
    """Return the size of a model whose attention ONNX Runtime's `bert` fusions know."""
    config = AutoConfig.from_pretrained(student)
    ours = getattr(config, "kind", None) == "encoder"  # it has ELECTRA's layers
    return dimensions(config) if ours or config.model_type in _BERT_LIKE else None


def _trace(model: PreTrainedModel, task: Task, file: Path) -> None:
    """Write a model with TorchScript's exporter."""
    graph = _graph_of(model, task)
    with quiet(), masks_without_vmap(), torch.no_grad():
        torch.onnx.export(
            _Positional(model, list(graph.inputs), task.also), tuple(graph.inputs.values()), file, dynamo=False,
            input_names=list(graph.inputs), output_names=graph.outputs, dynamic_axes=graph.axes, opset_version=OPSET,
        )  # fmt: skip
    _save(onnx.load(file), task, file, "torchscript")


def _export_by_dynamo(model: PreTrainedModel, task: Task, file: Path) -> None:
    """Write a model with dynamo's exporter, which stores tied embeddings once."""
    graph = _graph_of(model, task)
    sizes = [{i: axis for i, axis in graph.axes[name].items() if axis not in _FIXED} for name in graph.inputs]
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Positional(model, list(graph.inputs), task.also), tuple(graph.inputs.values()), dynamo=True, verbose=False,
            input_names=list(graph.inputs), output_names=graph.outputs, dynamic_shapes=(tuple(sizes),),
            opset_version=OPSET,
        )  # fmt: skip
    assert program is not None
    written = program.model_proto
    for node in written.graph.node:  # where each comes from in Python, which is half a megabyte
        del node.metadata_props[:]
        node.doc_string = ""
    del written.graph.value_info[:], written.graph.metadata_props[:], written.metadata_props[:]
    _save(written, task, file, "dynamo")


_EXPORTERS: dict[str, Callable[[PreTrainedModel, Task, Path], None]] = {
    "torchscript": _trace,
    "dynamo": _export_by_dynamo,
}


def _save(graph: onnx.ModelProto, task: Task, file: Path, exporter: str) -> None:
    about = {"made_by": "kdexport", "task": task.name, "graph": "plain", "exporter": exporter}
    onnx.helper.set_model_props(graph, about)
    onnx.save(graph, file)


def _difference(model: PreTrainedModel, task: Task, file: Path) -> float:
    """Return max |Δlogit| of a written graph on the task's examples and edge cases, in batches of several sizes."""
    rows = [*task.examples(), *task.probes()]
    logits, predictor = logits_of(model, task, rows), Predictor(task, file, threads=1)
    found = (predictor.logits(rows, batch_size) for batch_size in (None, 3, 1))
    return max(task.difference(one, logits) for one in found) / max(1.0, float(np.abs(logits).max()))


def _graph_of(model: PreTrainedModel, task: Task) -> Graph:
    """Return the graph of a task's model."""
    rows = (task.examples() * _ROWS)[:_ROWS]
    arrays = task.graph_inputs(task.encode(rows))
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    axes = task.axes()
    if not task.generates:
        return Graph(inputs, [*task.also, task.output], axes)
    inputs = {name: tensor[:, :_READ] for name, tensor in inputs.items()}
    with torch.no_grad():
        _, cache = read_after(model, None, input_ids=inputs["input_ids"][:, :_BEFORE])
    total = {0: "batch_size", 1: "past_sequence_length + sequence_length"}
    inputs["attention_mask"] = torch.ones(_ROWS, _BEFORE + _READ, dtype=torch.int64)
    axes["attention_mask"] = total
    if "position_ids" in signature(model.forward).parameters:
        inputs[POSITIONS] = torch.arange(_BEFORE, _BEFORE + _READ).repeat(_ROWS, 1)
        axes[POSITIONS] = axes["input_ids"]
    outputs = [task.output]
    for i, pair in enumerate(pairs_of(cache)):
        for kind, tensor in zip(("key", "value"), pair, strict=True):
            inputs[f"{PAST}{i}.{kind}"] = tensor
            axes[f"{PAST}{i}.{kind}"] = {0: "batch_size", 2: "past_sequence_length"}
            axes[f"{PRESENT}{i}.{kind}"] = {0: "batch_size", 2: "past_sequence_length + sequence_length"}
            outputs.append(f"{PRESENT}{i}.{kind}")
    axes[task.output] = {0: "batch_size", 1: "sequence_length"}
    return Graph(inputs, outputs, axes)


@contextlib.contextmanager
def masks_without_vmap() -> Iterator[None]:
    """Build transformers 4.57's attention masks by broadcasting, as 5 does: vmap can't be traced."""
    if LINE_5:
        yield
        return

    def broadcast(mask: Callable[..., Tensor], bh_indices: bool = True) -> Callable[..., Tensor]:
        return lambda b, h, q, k: mask(b[:, None, None, None], h[None, :, None, None], q[:, None], k)

    with (
        unittest.mock.patch.object(masking_utils, "_vmap_for_bhqkv", broadcast),
        unittest.mock.patch.object(masking_utils, "TransformGetItemToIndex", contextlib.nullcontext),
    ):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters: warnings of traced ifs, and whole graphs that C++ prints where one fails."""
    saved = {number: os.dup(number) for number in (1, 2)}
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere:
        warnings.simplefilter("ignore")
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for number, before in saved.items():
                os.dup2(before, number)
                os.close(before)
