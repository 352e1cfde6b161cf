"""kdexport: teacher in, budget in; the smallest honest ONNX model out.

>>> import kdexport
>>> report = kdexport.run(teacher="./my-bert", data="tickets.csv", out="runs/tickets")   # doctest: +SKIP
>>> kdexport.load("runs/tickets:int8").predict(["Shares rose after the merger"])         # doctest: +SKIP
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdexport.errors import (
    ArtifactError,
    DataError,
    KdexportError,
    MissingPackage,
    ModelError,
    RunError,
    SpecError,
    VerificationError,
)

if TYPE_CHECKING:
    from kdexport.pipeline.api import bench, compare, run
    from kdexport.pipeline.export_model import export
    from kdexport.results import Comparison, Exported, Report
    from kdexport.runtime.generation import Sampling, write
    from kdexport.runtime.predictor import Predictor, load

    __version__: str

__all__ = [
    "ArtifactError", "Comparison", "DataError", "Exported", "KdexportError", "MissingPackage", "ModelError",
    "Predictor", "Report", "RunError", "Sampling", "SpecError", "VerificationError", "__version__", "bench",
    "compare", "export", "load", "run", "write",
]  # fmt: skip

# numpy, tokenizers and onnxruntime are loaded when a model is, not when the package is
_LAZY = {
    "kdexport.pipeline.api": ("bench", "compare", "run"),
    "kdexport.pipeline.export_model": ("export",),
    "kdexport.results": ("Comparison", "Exported", "Report"),
    "kdexport.runtime.generation": ("Sampling", "write"),
    "kdexport.runtime.predictor": ("Predictor", "load"),
}
# Modules that model cards and Ray configs of older versions import.
_MOVED = {"kdexport.generation": "kdexport.runtime.generation", "kdexport.serve.ray": "kdexport.integrations.ray"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kdexport")
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'kdexport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Room(ModuleType):
    """`kdexport.bench` and `kdexport.export` are functions; once imported, also the folders of that name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return __getattr__(self.__name__.split(".")[1])(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in ("bench", "export"):  # the import system binds what it imported
            value.__class__ = _Room
        super().__setattr__(name, value)


class _Moved(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module(_MOVED[self.__name__]), name)


sys.modules[__name__].__class__ = _Package
sys.modules.update({name: _Moved(name) for name in _MOVED})
