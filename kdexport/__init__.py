"""kdexport: teacher in, budget in; the smallest honest ONNX model out.

>>> import kdexport
>>> model = kdexport.load("runs/demo/artifact")          # doctest: +SKIP
>>> model.predict(["Shares rose after the merger"])      # doctest: +SKIP
"""

from typing import Any

from kdexport.errors import KdexportError

__all__ = ["KdexportError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # numpy, tokenizers and onnxruntime are loaded when a model is, not when the package is
    if name == "__version__":
        from importlib.metadata import version

        return version("kdexport")
    if name == "load":
        from kdexport.runtime.predictor import load

        return load
    raise AttributeError(f"module 'kdexport' has no attribute {name!r}")
