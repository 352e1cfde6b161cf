"""Artifacts in service: loading, warming up, checking, hot swapping."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdexport.errors import ArtifactError, DataError, SpecError, TooLarge
from kdexport.files import hash_file
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Predictor, golden_difference
from kdexport.serve.generating import Generator
from kdexport.serve.http import RETRY, Refused
from kdexport.tasks import load_task
from kdexport.tasks.base import reads_files, reads_texts
from kdexport.tasks.config import Arrays
from kdexport.tasks.metrics import Array

# A name in a URL; names are looked up in a dict, never joined to a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Tolerance of this machine's logits against the packed ones: processors round the float32 parts of int8 differently.
_GOLDEN_TOLERANCE = 0.05
# Largest time per row of a doubled batch relative to the smaller one, unless the batch takes less than _SHORT_S.
_WORTH_IT, _SHORT_S = 0.95, 0.002
_TUNING_S = 0.05
_ALIKE = 8  # most cost of a row that shares a batch, in rows of the longest length


class Result(NamedTuple):
    """The output for one row: logits, float32 [C], scores by the model's own function, float64 [C], and its length."""

    logits: Array
    scores: Array
    size: int = 0


class Version:
    """One loaded artifact, immutable. A language model runs by its `generator` alone."""

    def __init__(self, name: str, folder: Path, variant: str | None, max_batch: int, max_batch_tokens: int) -> None:
        folder = artifact.resolve(folder)
        file = artifact.model_file(folder, variant)
        self.name, self.folder, self.loaded = name, folder, int(time.time())
        self.manifest = artifact.read_manifest(folder)
        self.variant = variant or self.manifest.recommended
        self.version = hash_file(folder / artifact.MANIFEST)[:12]
        self.task = load_task(folder)
        self._predictor = Predictor(self.task, file, threads=1)
        self._predictor.prove()
        difference = golden_difference(self._predictor, folder, self.variant)
        if difference is not None and not difference <= _GOLDEN_TOLERANCE:
            raise ArtifactError(
                f"{folder} does not answer here as it did when it was packed: a logit differs by {difference:.2g}",
                "Export it again on a machine like this one",
            )
        self.card = artifact.read_card(folder)
        # JSON bytes of a label with its score, of a word with its tag and position, or of a vector's number.
        self.entry_bytes = 80 + sum(map(len, self.task.labels)) // max(1, len(self.task.labels))
        if self.task.embeds:
            self.entry_bytes = 14
            self.token_width = self._predictor.states(self.task.encode(self.task.examples()[:1])).shape[-1]
        self.generator = Generator(self._predictor) if self.task.generates else None
        if self.generator:
            return
        self._lengths = self.task.lengths() or [1]
        self._warm_up(max_batch, max_batch_tokens)

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """Return a `Result` for each row, an input or arrays that the client encoded."""
        try:
            encoded = self._encoded(rows)
        except DataError as error:  # the bad row fails alone
            if len(rows) == 1:
                return [self._unread(error)]
            return [self.run([row])[0] for row in rows]
        logits = self._predictor.run(self.task.collate(encoded))
        sizes = self.task.sizes(encoded)
        return _finite(logits, [Result(*row) for row in zip(logits, self.task.scores(logits), sizes, strict=True)])

    def run_tokens(self, rows: Sequence[Any]) -> list[Any]:
        """Return a `Result` for each row that has a vector for each token, float32 [T, H], instead of one for all."""
        arrays = self.task.collate(self._encoded(rows))
        there = arrays["attention_mask"].astype(bool)
        states = self._predictor.states(arrays)
        found = [vectors[mask] for vectors, mask in zip(states, there, strict=True)]
        return _finite(states, [Result(vectors, vectors, len(vectors)) for vectors in found])

    def _encoded(self, rows: Sequence[Any]) -> list[Arrays]:
        plain = [i for i, row in enumerate(rows) if self.task.modality in row]
        encoded = list(rows)
        if plain:
            for i, arrays in zip(plain, self.task.tokenize([rows[i] for i in plain]), strict=True):
                encoded[i] = arrays
        return encoded

    def cost(self, row: dict[str, Any]) -> int:
        """Return a text's tokens, or the cost of an image or recording in usual rows; refuse unreadable headers."""
        task = self.task
        if reads_texts(task):
            return task.cost(row) if task.modality in row else task.sizes([row])[0]
        assert reads_files(task)
        try:
            return int(task.seconds(row) / self._row_seconds) + task.windows(row)
        except DataError as error:
            raise self._unread(error) from None

    def _unread(self, error: DataError) -> Refused:
        status = 413 if isinstance(error, TooLarge) else 422
        return Refused(status, f"the {self.task.modality} can't be read: {error}")

    def bucket(self, cost: int) -> int:
        """Return the smallest of the task's lengths that holds so many tokens; far longer rows run alone."""
        longest = self._lengths[-1]
        if cost > longest:
            return longest * (1 if cost <= longest * _ALIKE else _ALIKE)
        return next(length for length in self._lengths if cost <= length)

    def most(self, bucket: int) -> int:
        """Return the largest useful batch, by the warm-up."""
        return self._most.get(bucket, 1)

    def _warm_up(self, max_batch: int, max_batch_tokens: int) -> None:
        """Run every length, and double batches while they get faster per row."""
        self._most: dict[int, int] = {}  # length → rows of a batch
        self.rate = 1.0  # tokens/s at the most common length
        for length in self._lengths:
            one = self.task.sized(self.task.examples(), length)
            rows, per_row = 1, self._seconds(one)
            ends = time.monotonic() + _TUNING_S
            most = 1 if self.task.alone else max_batch
            while rows < most and 2 * rows * length <= max_batch_tokens and time.monotonic() < ends:
                more = {name: np.repeat(array, 2 * rows, axis=0) for name, array in one.items()}
                seconds = self._seconds(more)
                if seconds / (2 * rows) > _WORTH_IT * per_row and seconds > _SHORT_S:
                    break
                rows, per_row = 2 * rows, min(per_row, seconds / (2 * rows))
            self._most[length] = rows
            if length <= 32:
                self.rate, self._row_seconds = length / per_row, per_row

    def _seconds(self, arrays: Arrays) -> float:
        """Return the better of two runs; the first of a shape also allocates."""
        times = []
        for _ in range(2):  # not by timeit: it turns the collector off, for good if the graph hangs
            started = time.perf_counter()
            self._predictor.run(arrays)
            times.append(time.perf_counter() - started)
        return min(times)


class Tokens(NamedTuple):
    """A version of a model of vectors, as a batcher runs it for a vector of each token."""

    version: Version

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """Return the results of a batch."""
        return self.version.run_tokens(rows)

    def bucket(self, cost: int) -> int:
        """Return the padded length of a row."""
        return self.version.bucket(cost)

    def most(self, bucket: int) -> int:
        """Return the largest batch."""
        return self.version.most(bucket)


class Models:
    """Versions in service by name; the first name is the default."""

    def __init__(self, named: dict[str, tuple[Path, str | None]], max_batch: int, max_batch_tokens: int) -> None:
        self.names = list(named)  # in service or not
        self._sources, self._batch = named, (max_batch, max_batch_tokens)
        self._current: dict[str, Version] = {}

    def load(self, name: str) -> Version:
        """Load a model's folder and put it into service."""
        version = self.read(name)
        self.use(version)
        return version

    def read(self, name: str) -> Version:
        """Load a model's folder without putting it into service."""
        folder, variant = self._sources[name]
        with artifact.only_artifact_errors(folder):
            return Version(name, folder, variant, *self._batch)

    def use(self, version: Version) -> None:
        """Put a version into service; requests under way finish on the previous one."""
        self._current[version.name] = version

    def unload(self, name: str) -> None:
        """Take a model out of service; `load` brings it back."""
        self._current.pop(name, None)

    def find(self, name: str | None = None, version: str | None = None) -> Version:
        """Return the version in service, by default the first model's, or refuse (404, 503)."""
        name = self.names[0] if name is None else name
        if name not in self._sources:
            raise Refused(404, "there is no such model here")
        found = self._current.get(name)
        if found is None:
            raise Refused(503, f"{name} is not in service", RETRY)
        if version is not None and version != found.version:
            raise Refused(404, f"{name} is here in version {found.version} only")
        return found

    def reads(self, name: str | None = None) -> str:
        """Return a model's modality: text, image or audio; text if there is no such model."""
        version = self._current.get(name if name is not None else next(iter(self._sources), ""))
        return version.task.modality if version else "text"

    def in_service(self) -> dict[str, Version]:
        """Return the versions in service by name, in order."""
        return {name: self._current[name] for name in self.names if name in self._current}


def _finite(logits: Array, results: list[Any]) -> list[Any]:
    if np.isfinite(logits).all():
        return results
    bad = Refused(500, "the model's answer is not a finite number")  # JSON has no NaN
    return [result if np.isfinite(result.logits).all() else bad for result in results]


def named_sources(arguments: Sequence[str]) -> dict[str, tuple[Path, str | None]]:
    """Parse `[NAME=]FOLDER[:VARIANT]` into name → (folder, variant); `runs/tickets/artifact` is named `tickets`."""
    found: dict[str, tuple[Path, str | None]] = {}
    for argument in arguments:
        name, rest = argument.split("=", 1) if "=" in argument else ("", argument)
        folder, variant = artifact.split_name(rest)
        if not name:
            parts = [part for part in folder.resolve().parts if part != "artifact"]
            name = parts[-1] if parts else str(folder)
        if not _NAME.fullmatch(name):
            raise SpecError(f"{name!r} can't be a model's name", "Give one of letters and digits: NAME=FOLDER")
        if name in found:
            raise SpecError(f"two models are called {name}", "Name them: first=FOLDER second=FOLDER")
        found[name] = (folder, variant)
    return found
