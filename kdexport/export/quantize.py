"""Dynamic int8 quantization, and half precision; no torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import onnx


def quantize_int8(fp32: Path, int8: Path) -> None:
    """Quantize weights to int8 per channel, activations to uint8 at run time.

    Only products with constant weights are quantized (`MatMulConstBOnly`): the attention's own products gain
    nothing. Weights keep to 7 bits (`reduce_range`): on x86 without VNNI the products of 8-bit weights are
    summed in 16 bits and saturate, which changes answers silently (onnxruntime issues 6004 and 14642); with 7
    bits 2 · 255 · 64 fits, so the file is right on every machine, at the same speed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preprocessing step that changes nothing here
    try:
        quantize_dynamic(
            fp32,
            int8,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        root.setLevel(level)


def halve(fp32: Path, fp16: Path) -> None:
    """Weights and arithmetic in half precision, inputs and outputs as they were: for GPUs; CPUs gain nothing."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(fp32), keep_io_types=True), fp16)
