"""Artifacts whose graph has no end: an ONNX Loop that runs for ever, on every input or on those with one token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from kdexport.files import hash_file
from kdexport.runtime.artifact import sealed


def endless(source: Path, out: Path, token: int = -1) -> Path:
    """Copy an artifact of texts; its answers are random numbers, and none where a text holds `token` (-1: nowhere)."""
    shutil.copytree(source, out)
    manifest = json.loads((out / "kdexport.json").read_bytes())
    del manifest["files"]["golden.json"]
    onnx.save(_graph(manifest["task"]["inputs"], len(manifest["task"]["labels"]), token), out / "onnx" / "model.onnx")
    file = manifest["variants"]["fp32"]
    file["sha256"] = hash_file(out / "onnx" / "model.onnx")
    file["size_bytes"] = (out / "onnx" / "model.onnx").stat().st_size
    manifest |= {"recommended": "fp32", "variants": {"fp32": file}}
    (out / "kdexport.json").write_text(json.dumps(sealed(manifest)))
    (out / "golden.json").unlink()
    return out


def _graph(inputs: list[str], labels: int, token: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    boolean, number, integer = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT64
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Neg", ["x"], ["y"])],
        "body",
        [value("i", integer, []), value("go", boolean, []), value("x", number, [None, 1])],
        [value("go_on", boolean, []), value("y", number, [None, 1])],
    )
    one = [helper.make_tensor("token", integer, [], [token])]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=number),
        helper.make_node("ReduceMean", ["ids"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Equal", ["input_ids", "token"], ["equal"]),
        helper.make_node("Cast", ["equal"], ["numbers"], to=number),
        helper.make_node("ReduceMax", ["numbers"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["begin" if token >= 0 else "unused"], to=boolean),
        *([] if token >= 0 else [helper.make_node("Equal", ["token", "token"], ["begin"])]),
        helper.make_node("Loop", ["", "begin", "mean"], ["looped"], body=body),
        helper.make_node("Concat", ["looped"] * labels, ["logits"], axis=1),
    ]
    taken = [value(name, integer, [None, None]) for name in inputs]
    given = [value("logits", number, [None, labels])]
    graph = helper.make_graph(nodes, "endless", taken, given, one)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model
