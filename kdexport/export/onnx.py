"""PyTorch → ONNX, by Optimum's TorchScript exporter.

ONNX Runtime's fusions find no attention in the graphs of the dynamo exporter: docs/decisions.md.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager

from kdexport.errors import ModelError, VerificationError
from kdexport.models.registry import open_trained
from kdexport.tasks import load_task
from kdexport.tasks.base import Task

OPSET = 18


def export_onnx(student: Path, file: Path) -> None:
    """Write a student, a Hugging Face folder with `task.json`, as one fp32 ONNX file with dynamic axes.

    Raises:
        ModelError: Optimum has no export for this family of models.
        VerificationError: the graph's inputs, output or axes are not the task's.
    """
    task = load_task(student)
    model = open_trained(student).eval()
    with_cache = {"use_past": True, "use_past_in_inputs": True} if task.generates else {}
    try:
        config_class = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task=task.exporter, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"{model.config.model_type} models can't be exported yet: {error}") from None
    logging.getLogger("optimum").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # TorchScript's deprecation, and traced ifs on shapes
        export(model=model, config=config_class(model.config, **with_cache), output=file, opset=OPSET)
    graph = onnx.load(file)
    _check_names(graph, task)
    onnx.helper.set_model_props(graph, {"made_by": "kdexport", "task": task.name, "graph": "plain"})
    onnx.save(graph, file)


def _check_names(model: onnx.ModelProto, task: Task) -> None:
    axes = {
        tensor.name: {i: d.dim_param for i, d in enumerate(tensor.type.tensor_type.shape.dim) if d.dim_param}
        for tensor in (*model.graph.input, *model.graph.output)
    }
    inputs = [tensor.name for tensor in model.graph.input]
    if task.generates:  # the predictor adds the cache and positions
        inputs = [name for name in inputs if not name.startswith("past_key_values.") and name != "position_ids"]
    if set(inputs) != set(task.config.inputs):
        raise VerificationError(
            f"the exported graph wants {', '.join(inputs)}, the tokenizer gives {', '.join(task.config.inputs)}",
            "Set model_input_names in tokenizer_config.json",
        )
    if axes != task.axes() and not task.generates:
        raise VerificationError(f"the exported graph has {axes}, the task wants {task.axes()}")
