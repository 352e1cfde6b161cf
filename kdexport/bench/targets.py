"""What can be measured: a model as two functions, encode and run, opened in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kdexport.tasks import Task, load_task

Rows = list[dict[str, Any]]


class Target(msgspec.Struct, frozen=True):
    """A variant: its name, its runtime, its task's folder and its model (a folder for torch, else a file)."""

    name: str
    runtime: str
    task: str
    model: str


class Opened(NamedTuple):
    """An open target: its task, and encoded arrays → logits."""

    task: Task
    run: Callable[[Any], Any]


def open_target(target: Target, threads: int) -> Opened:
    """Open a target with this many threads of its runtime."""
    return RUNTIMES[target.runtime](target, threads)


def _open_onnxruntime(target: Target, threads: int) -> Opened:
    from kdexport.predictor import Predictor

    task = load_task(Path(target.task))
    return Opened(task, Predictor(task, Path(target.model), threads).run)


def _open_torch(target: Target, threads: int) -> Opened:
    """PyTorch in eager mode, as `from_pretrained` gives it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(target.model).eval()

    @torch.inference_mode()
    def run(arrays: Any) -> Any:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return model(**inputs).logits.numpy()

    return Opened(load_task(Path(target.task)), run)


RUNTIMES = {"onnxruntime": _open_onnxruntime, "torch": _open_torch}
