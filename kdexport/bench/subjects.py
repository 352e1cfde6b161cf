"""Subjects of measurement: a model as three functions, opened in its own process."""

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kdexport.errors import RunError
from kdexport.runtime.generation import timed
from kdexport.runtime.predictor import Predictor, providers
from kdexport.tasks import load_task
from kdexport.tasks.base import Generates, Task, can_generate, writes_speech
from kdexport.tasks.config import Arrays, Row
from kdexport.tasks.metrics import Array
from kdexport.tasks.speech_seq2seq import Read, SpeechSeq2Seq

Rows = Sequence[Row]

_TOKENS = 32  # of a language model's measured prompt, and as many new ones
# torch.compile's modes; reduce-overhead replays CUDA graphs.
_COMPILED = {"torch-compile": "default", "torch-cudagraphs": "reduce-overhead"}


class Target(msgspec.Struct, frozen=True):
    """A variant: name, runtime, the task's folder, and the model (a folder, a file or a URL).

    `slower` adds a relative delay (0.1: 10 %), to test the engine.
    """

    name: str
    runtime: str
    task: str
    model: str
    device: str = "cpu"
    slower: float = 0.0


def of_model(role: str, folder: Path, runtimes: Sequence[str], devices: Sequence[str]) -> list[Target]:
    """A Hugging Face folder in each requested PyTorch runtime: `<role>-torch`, …"""
    return [
        Target(f"{role}-{runtime}{_on(device)}", runtime, str(folder), str(folder), device)
        for device in devices
        for runtime in runtimes
        if runtime.startswith("torch") and (device == "cuda" or runtime != "torch-cudagraphs")
    ]


def of_file(name: str, task: Path, file: Path, runtimes: Sequence[str], devices: Sequence[str]) -> list[Target]:
    """An ONNX file in each requested runtime: `<name>` in ONNX Runtime, `<name>-openvino`, …"""
    found = [Target(f"{name}{_on(d)}", "onnxruntime", str(task), str(file), d) for d in devices]
    intel = [Target(f"{name}-openvino", "openvino", str(task), str(file))]
    return (found if "onnxruntime" in runtimes else []) + (intel if "openvino" in runtimes else [])


def _on(device: str) -> str:
    return "" if device == "cpu" else f"-{device}"


class Parts(msgspec.Struct, frozen=True):
    """Times of a run of a recogniser that writes, and the steps of its decoder."""

    encoder_ms: float
    decoder_ms: float
    steps: int


class Opened(NamedTuple):
    """An open target: rows → arrays → logits → answers, all part of the latency."""

    encode: Callable[[Rows], Any]
    run: Callable[[Any], Any]
    decode: Callable[[Any, Rows], Any]
    gpu_peak_mb: Callable[[], float | None] = lambda: None
    device_ms: Callable[[], list[float]] = list
    # For language models: logits of whole texts, and the run up to the first token.
    answer: Callable[[Any], Array] | None = None
    read: Callable[[Any], Any] | None = None
    # For what writes: times up to the first token in ms; for recognisers the parts of each run.
    first_ms: Callable[[], list[float]] = list
    parts: Callable[[], list[Parts]] = list


def open_target(target: Target, threads: int) -> Opened:
    """Open a target with this many runtime threads."""
    return RUNTIMES[target.runtime](target, threads)


def why_not(target: Target) -> str | None:
    """Return why this machine can't measure a target, or None; open nothing."""
    package = target.runtime.partition("-")[0]
    if package != "http" and find_spec(package) is None:
        return f"the package {package!r} is not installed"
    if target.device != "cuda":
        return None
    if package == "onnxruntime":
        return None if "CUDAExecutionProvider" in providers() else "onnxruntime has no CUDAExecutionProvider"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def _open_onnxruntime(target: Target, threads: int) -> Opened:
    task = load_task(Path(target.task))
    predictor = Predictor(task, Path(target.model), threads, target.device)
    if can_generate(task):
        return writing(task, predictor.read, predictor.run)
    if writes_speech(task):
        return hearing(task, predictor.hear, predictor.reader)
    return Opened(task.encode, predictor.run, task.decode)


def _open_torch(target: Target, threads: int) -> Opened:
    """Open a model in PyTorch, eager or compiled. On a GPU, a run includes both copies."""
    import torch

    from kdexport.models.caches import read_after
    from kdexport.models.registry import open_trained

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    task = load_task(Path(target.task))
    model: Any = open_trained(Path(target.model), task).eval().to(target.device)
    if target.runtime in _COMPILED:
        model = torch.compile(model, mode=_COMPILED[target.runtime], dynamic=True)
    cuda = target.device == "cuda"
    events: list[tuple[Any, Any]] = []

    @torch.inference_mode()
    def run(arrays: Any) -> Any:
        graph_inputs = task.graph_inputs(arrays)
        inputs = {name: torch.from_numpy(array).to(target.device) for name, array in graph_inputs.items()}
        if not cuda:
            return task.gather(model(**inputs).logits.numpy(), arrays)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        logits = model(**inputs).logits
        end.record()
        events.append((start, end))
        return task.gather(logits.float().cpu().numpy(), arrays)  # waits for the device

    def device_ms() -> list[float]:
        if cuda:
            torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def gpu_peak_mb() -> float | None:
        return torch.cuda.max_memory_allocated() / 1e6 if cuda else None

    if can_generate(task):

        @torch.inference_mode()
        def read(ids: Sequence[int], past: Any) -> Any:
            logits, past = read_after(model, past, input_ids=torch.tensor([ids]).to(target.device))
            return logits[0, -1].float().cpu().numpy(), past

        return writing(task, read, run)._replace(gpu_peak_mb=gpu_peak_mb)
    if writes_speech(task) and target.runtime == "torch" and not cuda:
        bands, without_grad = task.config.inputs[0], torch.inference_mode()
        hear = without_grad(lambda inputs: model.encoded(torch.from_numpy(inputs[bands])))
        return hearing(task, hear, lambda states: without_grad(model.reader(states)))
    return Opened(task.encode, run, task.decode, gpu_peak_mb, device_ms)


def writing(
    task: Generates, read: Callable[[Sequence[int], Any], tuple[Array, Any]], run_whole: Callable[[Any], Array]
) -> Opened:
    """Open a language model: greedy generation, from the first tokens of a text to as many more."""
    firsts: list[float] = []

    def encode(rows: Rows) -> Any:
        return {"input_ids": task.tokenize(rows[:1])[0]["input_ids"][None, : measured_tokens(task)]}

    def run(arrays: Any, count: int | None = None) -> list[int]:
        written, first = timed(read, arrays["input_ids"][0].tolist(), count or measured_tokens(task))
        firsts.append(1e3 * first)
        return written

    return Opened(
        encode, run, lambda ids, _: task.text_of(ids), answer=run_whole, read=lambda arrays: run(arrays, 1),
        first_ms=lambda: firsts,
    )  # fmt: skip


def hearing(task: SpeechSeq2Seq, hear: Callable[[Arrays], Any], reader: Callable[[Any], Read]) -> Opened:
    """Open a recogniser that writes: its encoder `hear`, and its decoder for the encoder's states."""
    firsts: list[float] = []
    parts: list[Parts] = []

    def run(arrays: Arrays) -> Array:
        times = [time.perf_counter()]
        states = hear(task.graph_inputs(arrays))
        times.append(time.perf_counter())
        read = reader(states)

        def step(ids: Array, cache: Any) -> tuple[Array, Any]:
            found = read(ids, cache)
            times.append(time.perf_counter())
            return found

        written = task.write(step, len(states))
        started, heard, first = times[:3]
        firsts.append(1e3 * (first - started))
        parts.append(Parts(1e3 * (heard - started), 1e3 * (time.perf_counter() - heard), len(times) - 2))
        return task.gather(written, arrays)

    return Opened(task.encode, run, task.decode, first_ms=lambda: firsts, parts=lambda: parts)


def measured_tokens(task: Task) -> int:
    """Most tokens of a measured prompt, and of its continuation; 0 for a task that doesn't generate."""
    return min(_TOKENS, task.config.max_length // 2) if can_generate(task) else 0


def _open_openvino(target: Target, threads: int) -> Opened:
    # In full precision: by default OpenVINO takes bfloat16 where the CPU has it, and logits differ a little.
    import openvino

    task = load_task(Path(target.task))
    if can_generate(task) or task.config.decoder:
        raise RunError("models that write text are not measured in OpenVINO yet")
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = openvino.Core().compile_model(target.model, "CPU", settings).create_infer_request()

    def run(arrays: Any) -> Any:
        return task.gather(request.infer(task.graph_inputs(arrays))[task.output], arrays)

    return Opened(task.encode, run, task.decode)


def _open_http(target: Target, threads: int) -> Opened:
    from kdexport.bench.generator import Connection, body_of

    connection = Connection(target.model)
    return Opened(lambda rows: body_of(target.model, rows), connection.post, lambda body, _: msgspec.json.decode(body))


RUNTIMES = {
    "onnxruntime": _open_onnxruntime,
    "torch": _open_torch,
    **dict.fromkeys(_COMPILED, _open_torch),
    "openvino": _open_openvino,
    "http": _open_http,
}
