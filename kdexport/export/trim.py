"""Compute the last layer only where it is read; no torch.

A classifier of the BERT family reads the first position of the last layer alone. All that follows the last attention
(output projection, feed-forward block, residuals and layer norms) works on each position by itself, so the others need
not be computed, and the logits are the same: docs/decisions.md.
"""

from collections import defaultdict

import numpy as np
import onnx
from onnx import numpy_helper

# Operators that treat every position alike when all but their data inputs are constants.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "FastGelu"}
_BY_LAST_AXIS = {"LayerNormalization", "SkipLayerNormalization", "BiasGelu"}

_START, _END, _AXIS = "first_position/start", "first_position/end", "first_position/axis"


def read_first_position_only(model: onnx.ModelProto) -> int:
    """Move the slice of the first position up the graph as far as possible, in place.

    Args:
        model: a graph whose hidden states are [batch, position, width].

    Returns:
        The number of nodes that now work on one position; 0 where the graph doesn't read the first one only.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input, *graph.output)}
    graph = model.graph
    constants = _constants(graph)
    consumers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    outputs = {value.name for value in graph.output}

    made_here: set[str] = set()  # tensors that are made, and read, at the first position only
    narrowed: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        name = node.output[0]
        only_first = consumers[name] and all(
            _picks_first(reader, constants) or reader.output[0] in made_here for reader in consumers[name]
        )
        single = name not in outputs and not any(node.output[1:]) and ranks.get(name, 3) == 3
        if only_first and single and _position_wise(node, constants):
            made_here.add(name)
            narrowed.append(node)
    if not narrowed:
        return 0
    _cut_inputs(graph, narrowed, made_here, constants)
    del graph.value_info[:]
    return len(narrowed)


def _cut_inputs(
    graph: onnx.GraphProto, narrowed: list[onnx.NodeProto], made_here: set[str], constants: dict[str, np.ndarray]
) -> None:
    """Slice to one position what narrowed nodes read from wide ones."""
    cut: dict[str, onnx.NodeProto] = {}
    for node in narrowed:
        for i, name in enumerate(node.input):
            if name and name not in constants and name not in made_here:
                if name not in cut:
                    cut[name] = onnx.helper.make_node("Slice", [name, _START, _END, _AXIS], [f"{name}/first"])
                    cut[name].name = f"{name}/first"
                node.input[i] = cut[name].output[0]
    for name, value in ((_START, 0), (_END, 1), (_AXIS, 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
    ordered = []
    for node in graph.node:
        ordered.append(node)
        ordered += [cut[name] for name in node.output if name in cut]
    del graph.node[:]
    graph.node.extend(ordered)


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in found:  # weights that are equal are stored once
            found[node.output[0]] = found[node.input[0]]
    return found


def _picks_first(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    if node.op_type != "Gather" or node.input[1] not in constants:
        return False
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    index = constants[node.input[1]]
    return axis == 1 and index.size == 1 and int(index.reshape(-1)[0]) == 0


def _position_wise(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    """Return whether each position of the output depends on the same position of the inputs alone."""
    held = [constants[name] for name in node.input if name in constants]
    if node.op_type == "MatMul":
        return node.input[0] not in constants and node.input[1] in constants and held[0].ndim == 2
    if any(value.ndim > 1 for value in held):
        return False
    if node.op_type == "LayerNormalization":
        return next((a.i for a in node.attribute if a.name == "axis"), -1) in (-1, 2)
    return node.op_type in _ELEMENTWISE | _BY_LAST_AXIS
