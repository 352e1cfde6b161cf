"""Artifacts at run time: numpy, tokenizers and ONNX Runtime, no torch."""
