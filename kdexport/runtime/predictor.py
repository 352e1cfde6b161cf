"""An artifact as a function: encode → ONNX Runtime → decode. No torch, no transformers.

Verification, benchmarks, `kdexport predict` and serving all run models through here: the measured code is what ships.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdexport.errors import ArtifactError, DataError, MissingPackage, first_line
from kdexport.runtime import artifact
from kdexport.runtime.transcription import PAST, PRESENT, reader
from kdexport.tasks import load_task
from kdexport.tasks.base import Task, can_embed, writes_speech
from kdexport.tasks.batches import in_batches
from kdexport.tasks.config import Arrays, Row
from kdexport.tasks.inputs.media import inline_bytes
from kdexport.tasks.metrics import Array
from kdexport.tasks.speech_seq2seq import Read
from kdexport.tasks.vectors import DTYPES, EmbeddingDtype, check_dimensions, encoded, shortened

# A text, a pair, or words (for tokens); a path or bytes of an image or a recording.
Text = str | tuple[str, str] | list[str] | bytes | Path
POSITIONS = "position_ids"
# The maximum of numbers in golden.json; logits for each of 8,192 tokens are large.
_MOST_NUMBERS = 3_000_000
# The number of tokens read, and their keys and values by input name.
Past = tuple[int, dict[str, Any]]


def allowed_cores() -> int:
    """Return the CPU cores available to this process: by affinity, and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period))) if quota != "max" else cores
    except (OSError, ValueError):
        return cores


class Predictor:
    """A task and its ONNX file, on all allowed cores by default; `device` is cpu, or cuda with onnxruntime-gpu.

    The file of a model that writes what it hears is its encoder; the decoder lies beside it.
    """

    def __init__(self, task: Task, model: Path, threads: int | None = None, device: str = "cpu") -> None:
        self.task, self._cuda = task, device == "cuda"
        self._session = _opened(model, threads or allowed_cores(), device)
        decoder = artifact.decoder_of(model) if writes_speech(task) else None
        self._decoder = _opened(decoder, threads or allowed_cores(), device) if decoder else None
        inputs = self._session.get_inputs()
        self._cache = {tensor.name: tensor for tensor in inputs if tensor.name.startswith(PAST)}
        wanted = {tensor.name for tensor in inputs} - self._cache.keys() - {POSITIONS}
        if wanted != set(task.config.inputs):
            raise ArtifactError(f"{model} wants {sorted(wanted)}, the task gives {sorted(task.config.inputs)}")
        self._positions = any(tensor.name == POSITIONS for tensor in inputs)

    def run(self, arrays: Arrays) -> Array:
        """Return the logits of an encoded batch, float32 [B, *answer_shape]."""
        return self.task.gather(self._output(arrays), arrays)

    def prove(self) -> None:
        """Run two short rows, to detect a file that doesn't fit its task before the first request."""
        rows = self.task.probes()[:2]
        arrays = self.task.encode(rows)
        output, labels = self._output(arrays), len(self.task.labels)
        if labels and (output.ndim != 1 + len(self.task.answer_shape) or output.shape[-1] != labels):
            raise ArtifactError(f"the model gives logits {list(output.shape)}, its task has {labels} labels")
        found, wanted = self.task.gather(output, arrays).shape, (len(rows), *self.task.answer_shape)
        if found != wanted:
            raise ArtifactError(f"the model gives logits {list(found)}, its task wants {list(wanted)}")

    def _output(self, arrays: Arrays) -> Array:
        inputs = self.task.graph_inputs(arrays)
        if writes_speech(self.task):
            states = self.hear(inputs)
            return self.task.write(self.reader(states), len(states))
        if self._cache:
            inputs = inputs | self._nothing_before(*inputs["input_ids"].shape)
        if not self._cuda:
            return np.asarray(self._session.run([self.task.output], inputs)[0])
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(self.task.output, "cuda")
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return np.asarray(binding.copy_outputs_to_cpu()[0])

    def hear(self, inputs: Arrays) -> Array:
        """Return the encoder's states [B, T, H] of a model that writes what it hears."""
        return np.asarray(self._session.run(None, inputs)[0])

    def states(self, arrays: Arrays) -> Array:
        """Return the states of all tokens of an encoded batch [B, T, H], where the answers are vectors."""
        return np.asarray(self._session.run([*self.task.also], self.task.graph_inputs(arrays))[0])

    def reader(self, states: Array) -> Read:
        """Return the decoder for an encoder's states."""
        return reader(_onnxruntime(), self._decoder, states)

    def read(self, ids: Sequence[int], past: Past | None = None) -> tuple[Array, Past]:
        """Read tokens after a cache `past`: return the next token's logits [V] and the extended cache."""
        before, values = past or (0, {name: self._value(array) for name, array in self._nothing_before(1, 1).items()})
        length = before + len(ids)
        given = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), dtype=np.int64)}
        if self._positions:
            given[POSITIONS] = np.arange(before, length)[None]
        feed = values | {name: self._value(array) for name, array in given.items()}
        names = [self.task.output, *(name.replace(PAST, PRESENT, 1) for name in self._cache)]
        logits, *present = self._session.run_with_ort_values(names, feed)
        return logits.numpy()[0, -1], (length, dict(zip(self._cache, present, strict=True)))

    def _nothing_before(self, rows: int, length: int) -> Arrays:
        """Return the inputs of an empty cache."""
        shapes = {name: (rows, tensor.shape[1], 0, tensor.shape[3]) for name, tensor in self._cache.items()}
        empty = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        return empty | ({POSITIONS: np.arange(length)[None].repeat(rows, 0)} if self._positions else {})

    def _value(self, array: Array) -> Any:
        return _onnxruntime().OrtValue.ortvalue_from_numpy(array)

    def logits(self, rows: Sequence[Row], batch_size: int | None = None) -> Array:
        """Return the logits of many rows, float32 [N, *answer_shape], in their order."""
        return in_batches(self.task, rows, self.run, batch_size)

    def predict(self, texts: Sequence[Text] | Text, batch_size: int = 32) -> list[Any]:
        """Predict for texts, pairs of texts, images or recordings, in their order.

        `texts` are strings, tuples of two for pairs, or lists of words for tokens; for media, paths or bytes. A single
        string, path or bytes is a list of one; an empty text is valid.

        Each input's record is a `Prediction` (`label`, its probability `score`, all `scores` by label); for tokens a
        `TaggedText` (`words`, `tags`, `scores`, `entities`); for sentence embeddings a `Vector` (`values`; `embed`
        returns one array); for language models `LanguageModelScores`, the text's likelihood (`kdexport.write` continues
        a text).
        """
        if isinstance(texts, tuple) and texts and all(isinstance(text, str) for text in texts):
            raise DataError("a tuple of texts may be one pair or several texts", 'Write [("a", "b")] or ["a", "b"]')
        many: list[Any] = [texts] if isinstance(texts, str | bytes | Path) else list(texts)
        return self.answer([row_of(self.task, text, i) for i, text in enumerate(many)], batch_size)

    def embed(
        self, texts: Sequence[str] | str, batch_size: int = 32, prompt: str | None = None,
        dimensions: int | None = None, dtype: EmbeddingDtype = "float",
    ) -> Array:  # fmt: skip
        """Return the vectors of texts, in their order: float32 [N, D]; int8 [N, D]; or bits, uint8 [N, ⌈D / 8⌉].

        `prompt` names one of the model's prompts, which is put before each text. `dimensions` are the first ones of
        each vector, at length 1 again. The numbers of int8 and binary have the same meaning in all calls.

        Raises:
            DataError: the model makes no vectors, has no such prompt, or fewer dimensions.
        """
        task = self.task
        if not can_embed(task):
            raise DataError(f"the model is for {task.name}, and makes no vectors", "Call predict")
        if dtype not in DTYPES:
            raise DataError(f"the dtype {dtype!r} is unknown", f"Take one of {', '.join(DTYPES)}")
        task.check_prompt(prompt)
        check_dimensions(task.width, dimensions)
        many = [texts] if isinstance(texts, str) else texts
        rows = [row_of(task, text, i) | ({"prompt": prompt} if prompt else {}) for i, text in enumerate(many)]
        return encoded(shortened(self.logits(rows, batch_size), dimensions), dtype)

    def answer(self, rows: Sequence[dict[str, Any]], batch_size: int = 32) -> list[Any]:
        """Predict for rows in the task's format; see `predict`."""
        return list(self.task.decode(self.logits(rows, batch_size), rows)) if rows else []


def _opened(model: Path, threads: int, device: str) -> Any:
    """Return a session of an ONNX file; raise ArtifactError if it can't be loaded, or not on this device."""
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads waste cores, and double latency on shared machines.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # errors are raised anyway
    try:
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        session = onnxruntime.InferenceSession(str(model), options, providers=[provider], enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen classes
        raise ArtifactError(f"{model} can't be loaded: {first_line(error)}", "Pack the artifact again") from None
    if (got := session.get_providers()[0]) != provider:  # it falls back silently
        raise ArtifactError(f"{model} runs on {got}, not on {provider}", "See kdexport doctor for what is there")
    return session


def load(
    folder: str | Path, variant: str | None = None, threads: int | None = None, words: Iterable[str] | None = None
) -> Predictor:
    """Load an artifact, or a run that holds one, after checking its checksums.

    A variant may follow the folder, `runs/demo:int8`; by default it is the recommended one, on all allowed cores.
    `words` are the only ones that a recogniser of speech is to write.
    """
    with artifact.only_artifact_errors(Path(folder)):
        place, named = artifact.split_name(folder)
        if variant and named not in (None, variant):
            raise ArtifactError(f"{folder} names the variant {named}, and {variant} is asked for too", "Name one")
        folder = artifact.resolve(place)
        model = artifact.model_file(folder, variant or named)
        predictor = Predictor(load_task(folder), model, threads)
        predictor.prove()
    if words is not None:
        predictor.task.restrict(words)
    return predictor


def golden_answers(task: Task, files: Mapping[str, Path]) -> artifact.Golden:
    """Return each variant's logits on the task's probes and examples, to be packed with it."""
    rows = [*task.probes(), *task.examples()]
    rows = rows[: max(1, _MOST_NUMBERS // (math.prod(task.answer_shape) * len(files)))]
    answers = {variant: Predictor(task, file, threads=1).logits(rows, batch_size=1) for variant, file in files.items()}
    return artifact.Golden(rows, {name: logits.astype(float).round(6).tolist() for name, logits in answers.items()})


def golden_difference(predictor: Predictor, folder: Path, variant: str) -> float | None:
    """Return max |Δlogit| of a loaded file from its artifact's golden logits; None without those."""
    golden, task = artifact.read_golden(artifact.resolve(folder)), predictor.task
    if golden is None or variant not in golden.logits:
        return None
    for row in golden.rows:
        if not {task.modality} <= row.keys() <= {task.modality, "text_pair", "label"}:
            raise ArtifactError(f"{folder}/{artifact.GOLDEN} has a row that holds no {task.modality}")
        if task.modality != "text":
            try:  # inline only: a path would read any file of this machine
                inline_bytes(row[task.modality])
            except DataError:
                raise ArtifactError(f"{folder}/{artifact.GOLDEN} has a row that holds no {task.modality}") from None
    try:
        packed = np.array(golden.logits[variant], dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{folder}/{artifact.GOLDEN} has logits that are no table: {error}") from None
    shape = (len(golden.rows), *task.answer_shape)
    if packed.shape != shape or not np.isfinite(packed).all():
        raise ArtifactError(f"{folder} has golden answers {packed.shape}, its {variant} file gives {shape}")
    with artifact.only_artifact_errors(folder):
        return task.difference(predictor.logits(golden.rows, batch_size=1), packed)


class Tensor(NamedTuple):
    """An input or output of a graph; a dynamic axis is None."""

    name: str
    type: str
    shape: list[int | None]


def tensors_of(model: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Return an ONNX file's inputs and outputs; types are `int64`, `float`, …"""
    with artifact.only_artifact_errors(model):
        session = _onnxruntime().InferenceSession(str(model), providers=["CPUExecutionProvider"], enable_fallback=0)

    def tensor(found: Any) -> Tensor:
        sizes = [size if isinstance(size, int) else None for size in found.shape]
        return Tensor(found.name, found.type.removeprefix("tensor(").removesuffix(")"), sizes)

    return [tensor(found) for found in session.get_inputs()], [tensor(found) for found in session.get_outputs()]


def providers() -> list[str]:
    """Return ONNX Runtime's execution providers on this machine."""
    return list(_onnxruntime().get_available_providers())


def _onnxruntime() -> Any:
    # From 1.29 on, ONNX Runtime's wheels send telemetry unless this is set before the import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingPackage("onnxruntime", "cpu") from None
    return onnxruntime


def row_of(task: Task, given: object, i: int) -> dict[str, Any]:
    """Convert the i-th input to a row; a `DataError` names the input."""
    try:
        return task.row(given)
    except DataError as error:
        named = given if isinstance(given, str | Path) and task.modality != "text" else f"input {i}"
        what = error.what if error.what.startswith(str(given)) else f"{named} {error.what.removeprefix('it ')}"
        raise DataError(what, error.fix) from None
