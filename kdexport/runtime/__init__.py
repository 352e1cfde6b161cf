"""An artifact loaded and answering: numpy, tokenizers and ONNX Runtime, no torch."""
