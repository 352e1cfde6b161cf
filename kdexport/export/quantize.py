"""Quantization to int8, dynamic or static, to int4, and half precision; no torch."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from kdexport.tasks.config import Arrays

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def quantize_int8(fp32: Path, int8: Path) -> None:
    """Quantize weights to int8 per channel, activations to uint8 at run time.

    Only products with constant weights are quantized (`MatMulConstBOnly`): attention's own products gain nothing.
    Weights have 7 bits (`reduce_range`), as 8-bit ones saturate on x86 without VNNI: docs/decisions.md.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_advice():
        quantize_dynamic(
            fp32,
            int8,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_slow_in_int8(fp32) + _reading_products(fp32),
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )


def convolves(fp32: Path) -> bool:
    """Return whether most weights belong to convolutions, which dynamic quantization skips."""
    graph = onnx.load(fp32).graph
    of_convolutions = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:2]}
    sizes = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
    return 2 * sum(size for name, size in sizes.items() if name in of_convolutions) > sum(sizes.values())


def recurs(fp32: Path) -> bool:
    """Return whether a graph has recurrent layers behind convolutions: int8 gains nothing there (docs/decisions.md)."""
    return {"GRU", "Conv"} <= {node.op_type for node in onnx.load(fp32).graph.node}


def quantize_static_int8(fp32: Path, int8: Path, batches: Iterable[Arrays]) -> None:
    """Quantize weights to 7 bits per channel, activations to uint8 by their ranges in some hundred training rows.

    Ranges are the least and the largest value (`MinMax`): after batch norms there are no outliers worth clipping.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    with _without_advice():
        quantize_static(
            fp32,
            int8,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=_slow_in_int8(fp32),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def quantize_int4(fp32: Path, int4: Path) -> None:
    """Quantize weights of products and of token embeddings to 4 bits, in blocks of 32 with a scale each.

    Round to nearest, symmetric, as ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` read it: for language
    models, which are bound by reading weights.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(fp32))
    model.replace_gemm_with_matmul()
    with _without_advice():
        quantizer = MatMulNBitsQuantizer(
            model.model,
            block_size=32,
            is_symmetric=True,
            accuracy_level=4,  # products of int8, as VNNI has them
            op_types_to_quantize=("MatMul", "Gather"),
        )
        quantizer.process()
    onnx.save(quantizer.model.model, int4)


def _slow_in_int8(fp32: Path) -> list[str]:
    """Return convolutions whose weights the graph computes, which can't be quantized, and all behind a waveform.

    Those of Wav2Vec2 and its kin would take twice the time of fp32: docs/decisions.md.
    """
    graph = onnx.load(fp32).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    waveform = any(_reads_waveform(node, shapes.get(node.input[1], [])) for node in convolutions)
    return [node.name for node in convolutions if waveform or node.input[1] not in shapes]


def _reads_waveform(convolution: onnx.NodeProto, weight: list[int]) -> bool:
    groups = next((attribute.i for attribute in convolution.attribute if attribute.name == "group"), 1)
    return len(weight) == 3 and weight[1] == 1 and groups == 1


def _reading_products(fp32: Path) -> list[str]:
    """Return gathers from weights of a product, which decide how these are quantized: tied tables of words."""
    graph = onnx.load(fp32).graph
    of_products = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    return [node.name for node in graph.node if node.op_type == "Gather" and node.input[0] in of_products]


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence ONNX Runtime's recommendation of a preprocessing step that changes nothing here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def halve(fp32: Path, fp16: Path) -> None:
    """Convert weights and arithmetic to half precision, not inputs and outputs: for GPUs, as CPUs gain nothing."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(fp32), keep_io_types=True), fp16)
