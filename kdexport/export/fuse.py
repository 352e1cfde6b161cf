"""Offline graph fusion for ONNX Runtime; no torch.

Attention, layer norms and activations become ONNX Runtime's own operators. The fused graph is a candidate beside the
plain one, which newer runtimes fuse as they load it, and which runs elsewhere too: the faster one ships.
"""

import logging
import os
from pathlib import Path

import onnx

from kdexport.export.trim import read_first_position_only
from kdexport.progress import say

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def trim(plain: Path) -> None:
    """Rewrite the plain graph so that its last layer is computed only where it is read."""
    model = onnx.load(plain)
    if read_first_position_only(model):
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, plain)


def attends(plain: Path) -> bool:
    """Return whether a graph has attention."""
    return any(node.op_type == "Softmax" for node in onnx.load(plain).graph.node)


def fuse(plain: Path, fused: Path, layers: int, heads: int, width: int) -> bool:
    """Write the fused graph, and return whether attention was fused in every layer; if not, nothing is written."""
    from onnxruntime.transformers import optimizer

    modules = ("fusion_utils", "onnx_model", "optimizer", "onnx_model_bert", "fusion_base", "fusion_attention")
    for name in ("onnxruntime.transformers", *modules):
        logging.getLogger(name).setLevel(logging.ERROR)
    graph = onnx.load(plain)
    # ONNX Runtime's shape inference stops at ReduceMax, and attention behind it is not fused; ReduceSum has its shapes.
    maxima = {node.name for node in graph.graph.node if node.op_type == "ReduceMax"}
    _rename(graph, maxima, "ReduceSum")
    onnx.save(graph, fused)
    model = optimizer.optimize_model(
        str(fused),
        model_type="bert",
        num_heads=heads,
        hidden_size=width,
        opt_level=0,
    )
    attention = model.get_fused_operator_statistics().get("Attention", 0)
    if attention < layers:
        say(f"export: ONNX Runtime fused {attention} of {layers} attention layers; there is no fused graph")
        fused.unlink()
        return False
    _rename(model.model, maxima, "ReduceMax")
    _import_used_domains(model.model)
    read_first_position_only(model.model)
    onnx.helper.set_model_props(model.model, {p.key: p.value for p in model.model.metadata_props} | {"graph": "fused"})
    onnx.save(model.model, fused)
    return True


def _rename(model: onnx.ModelProto, names: set[str], operator: str) -> None:
    for node in model.graph.node:
        if node.name in names:
            node.op_type = operator


def _import_used_domains(model: onnx.ModelProto) -> None:
    """Import only the operator sets in use: other runtimes refuse a file for one they do not know."""
    used = {node.domain or "" for node in model.graph.node}
    versions = {opset.domain: opset.version for opset in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, versions.get(domain, 1)) for domain in sorted(used))
