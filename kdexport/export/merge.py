"""Two graphs as the branches of one, with the weights of both stored once; no torch."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper


def merge(first: onnx.ModelProto, later: onnx.ModelProto, switch: str) -> onnx.ModelProto:
    """Return a graph with the inputs of both and the outputs of `first`, which runs `later` where `switch` is true.

    Outputs that `later` lacks are empty there, as Optimum's merged decoders have them: who runs it has them already.
    """
    weights = dict[str, onnx.TensorProto]()
    inputs = {value.name: value for model in (first, later) for value in model.graph.input}
    outputs = list(first.graph.output)
    branches = {
        name: _branch(model.graph, name, weights, {*inputs}, outputs)
        for name, model in (("then_branch", later), ("else_branch", first))
    }
    chosen = helper.make_node("If", [switch], [value.name for value in outputs], name="cache_or_none", **branches)
    flag = helper.make_tensor_value_info(switch, onnx.TensorProto.BOOL, [1])
    graph = helper.make_graph([chosen], "merged", [*inputs.values(), flag], outputs, [*weights.values()])
    opsets = {opset.domain: opset for model in (first, later) for opset in model.opset_import}
    merged = helper.make_model(graph, opset_imports=[*opsets.values()], ir_version=first.ir_version)
    onnx.checker.check_model(merged, full_check=False)
    return merged


def _branch(
    graph: onnx.GraphProto, prefix: str, weights: dict[str, onnx.TensorProto], inputs: set[str],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.GraphProto:  # fmt: skip
    """Return a graph without inputs, whose weights are added to `weights`, and other names begin with `prefix`."""
    renamed = {name: name for name in inputs}
    for tensor in graph.initializer:
        renamed[tensor.name] = _store(tensor, weights)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    for node in nodes:
        node.name = f"{prefix}/{node.name}"
        for names in (node.input, node.output):
            names[:] = [name and renamed.get(name, f"{prefix}/{name}") for name in names]
    there = {value.name for value in graph.output}
    found = [helper.make_tensor_value_info(f"{prefix}/{value.name}", onnx.TensorProto.FLOAT, None) for value in outputs]
    for value in outputs:
        if value.name not in there:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # 0 where it is dynamic
            empty = numpy_helper.from_array(np.zeros(shape, np.float32))
            nodes.append(helper.make_node("Constant", [], [f"{prefix}/{value.name}"], value=empty))
    return helper.make_graph(nodes, prefix, [], found)


def _store(tensor: onnx.TensorProto, weights: dict[str, onnx.TensorProto]) -> str:
    """Add a tensor, unless one of the same content is there, and return its name."""
    content = onnx.TensorProto.FromString(tensor.SerializeToString())
    content.name = ""
    name = f"weights/{sha256(content.SerializeToString()).hexdigest()[:16]}"
    if name not in weights:
        content.name = name
        weights[name] = content
    return name


def share_table(model: onnx.ModelProto) -> None:
    """Read token embeddings from the output layer's weights [H, V], where both are the same table, in place."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    heads = [tensors[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in tensors]
    for node in list(graph.node):
        table = tensors.get(node.input[0]) if node.op_type == "Gather" else None
        head = next((one for one in heads if table is not None and list(one.dims) == list(table.dims)[::-1]), None)
        if table is None or head is None or table.dims[0] == table.dims[1] or not _are_transposed(table, head):
            continue
        found, columns = node.output[0], f"{node.output[0]}/columns"
        replace_node(graph, node, [
            helper.make_node("Gather", [head.name, node.input[1]], [columns], name=f"{node.name}/columns", axis=1),
            helper.make_node("Transpose", [columns], [found], name=f"{node.name}/turned", perm=[1, 2, 0]),
        ])  # fmt: skip
        graph.initializer.remove(table)


def read_quantized_table(file: Path) -> None:
    """Read token embeddings from the output layer's quantized weights, where `share_table` made them one table."""
    model = onnx.load(file)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        name = node.input[0] if node.op_type == "Gather" else ""
        quantized, scale = f"{name}_quantized", f"{name}_scale"
        if name not in tensors or quantized not in tensors or tensors[scale].dims != tensors[name].dims[1:]:
            continue
        parts = [f"{node.output[0]}/{part}" for part in ("quantized", "float", "scale")]
        replace_node(graph, node, [
            helper.make_node("Gather", [quantized, node.input[1]], [parts[0]], name=parts[0], axis=1),
            helper.make_node("Cast", [parts[0]], [parts[1]], name=parts[1], to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [scale, node.input[1]], [parts[2]], name=parts[2]),
            helper.make_node("Mul", [parts[1], parts[2]], [node.output[0]], name=f"{node.name}/scaled"),
        ])  # fmt: skip
        graph.initializer.remove(tensors[name])
    onnx.save(model, file)


def replace_node(graph: onnx.GraphProto, node: onnx.NodeProto, by: Iterable[onnx.NodeProto]) -> None:
    """Put nodes in the place of one."""
    nodes = [new for old in graph.node for new in (by if old is node else [old])]
    del graph.node[:]
    graph.node.extend(nodes)


def _are_transposed(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    return bool(np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other).T))
