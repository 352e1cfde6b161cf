"""Artifacts in service: loaded, warmed, checked, swapped for a newer version while requests run."""

from __future__ import annotations

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
from kdexport.tasks.metrics import Array

# What a name in a URL may look like; names are looked up in a dict, never joined to a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# How far this machine's logits may be from those that were packed. int8 products are exact, what stands between
# them is float32; other processors round it otherwise.
_GOLDEN_TOLERANCE = 0.05
# A larger batch must be this much faster by the row, or it only makes others wait.
_WORTH_IT = 0.95
# … unless it is over so soon that nobody waits: then what every batch costs beside its run is shared by more rows.
_SHORT_S = 0.002
_TUNING_S = 0.05
# Rows of the largest usual length that another row may cost to share a batch with them.
_ALIKE = 8


class Result(NamedTuple):
    """The output for one row."""

    logits: Array
    """float32 [C]."""
    scores: Array
    """float64 [C], by the model's own function; taken for a whole batch at once."""


class Version:
    """One loaded artifact; it does not change. A language model has a `generator`, and runs nothing else."""

    def __init__(self, name: str, folder: Path, variant: str | None, max_batch: int, max_batch_tokens: int) -> None:
        folder = artifact.resolve(folder)
        file = artifact.model_file(folder, variant)
        self.name, self.folder = name, folder
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
        # Of a label with its score, or a word with its tag and place, in a JSON answer.
        self.entry_bytes = 80 + sum(map(len, self.task.labels)) // max(1, len(self.task.labels))
        self.generator = Generator(self._predictor) if self.task.generates else None
        if self.generator:
            return
        self._lengths = self.task.lengths() or [1]
        self._most, self.rate = self._warm_up(max_batch, max_batch_tokens)

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """Return a `Result` for each row: a text, or arrays that the client encoded."""
        plain = [i for i, row in enumerate(rows) if self.task.modality in row]
        encoded = list(rows)
        if plain:
            try:
                for i, arrays in zip(plain, self.task.tokenize([rows[i] for i in plain]), strict=True):
                    encoded[i] = arrays
            except DataError as error:  # it fails alone, whoever shares its batch
                if len(rows) == 1:
                    return [self._unread(error)]
                return [self.run([row])[0] for row in rows]
        logits = self._predictor.run(self.task.collate(encoded))
        results: list[Any] = [Result(*row) for row in zip(logits, self.task.scores(logits), strict=True)]
        if not np.isfinite(logits).all():  # JSON has no NaN
            bad = Refused(500, "the model's answer is not a finite number")
            return [result if np.isfinite(result.logits).all() else bad for result in results]
        return results

    def cost(self, row: dict[str, Any]) -> int:
        """Return a text's tokens; of a picture or a recording, the usual rows that could run in the time it takes.

        One whose header shows that it can't be read (422), or would cost too much (413), is refused.
        """
        task = self.task
        if reads_texts(task):
            return task.cost(row)
        assert reads_files(task)
        try:
            return 1 + int(task.seconds(row) / self._row_seconds)
        except DataError as error:
            raise self._unread(error) from None

    def _unread(self, error: DataError) -> Refused:
        status = 413 if isinstance(error, TooLarge) else 422
        return Refused(status, f"the {self.task.modality} can't be read: {error}")

    def bucket(self, cost: int) -> int:
        """Return the smallest of the task's lengths that holds so many tokens.

        Rows that take far longer than usual run alone: others would wait for them, and their own deadlines are looked
        at between batches.
        """
        longest = self._lengths[-1]
        for length in self._lengths:
            if cost <= length:
                return length
        return longest if cost <= longest * _ALIKE else longest * _ALIKE

    def most(self, bucket: int) -> int:
        """Return the rows of a batch, as warm-up found them to pay."""
        return self._most.get(bucket, 1)

    def _warm_up(self, max_batch: int, max_batch_tokens: int) -> tuple[dict[int, int], float]:
        """Run every length once, and find by doubling where larger batches stop being faster by the row.

        Returns:
            length → rows of a batch, and the tokens a second of the length that texts most often have.
        """
        most, rate = {}, 1.0
        for length in self._lengths:
            one = self.task.sized(self.task.examples(), length)
            rows, per_row = 1, self._seconds(one)
            ends = time.monotonic() + _TUNING_S
            while rows < max_batch and 2 * rows * length <= max_batch_tokens and time.monotonic() < ends:
                more = {name: np.repeat(array, 2 * rows, axis=0) for name, array in one.items()}
                seconds = self._seconds(more)
                if seconds / (2 * rows) > _WORTH_IT * per_row and seconds > _SHORT_S:
                    break
                rows, per_row = 2 * rows, min(per_row, seconds / (2 * rows))
            most[length] = rows
            if length <= 32:
                rate, self._row_seconds = length / per_row, per_row
        return most, rate

    def _seconds(self, arrays: Any) -> float:
        """Time the better of two runs; the first of a shape also allocates."""
        times = []
        for _ in range(2):
            started = time.perf_counter()
            self._predictor.run(arrays)
            times.append(time.perf_counter() - started)
        return min(times)


class Models:
    """Name → the version in service, in the order in which they were named; the first is the default."""

    def __init__(self, named: dict[str, tuple[Path, str | None]], max_batch: int, max_batch_tokens: int) -> None:
        self._sources, self._batch = named, (max_batch, max_batch_tokens)
        self._current: dict[str, Version] = {}

    def load(self, name: str) -> Version:
        """Load the version that now lies in a model's folder, and put it into service."""
        version = self.read(name)
        self.use(version)
        return version

    def read(self, name: str) -> Version:
        """Load the version that now lies in a model's folder, without putting it into service.

        Raises:
            ArtifactError: it is incomplete, was changed, can't be run, or does not answer as it did when it was packed.
        """
        folder, variant = self._sources[name]
        with artifact.only_artifact_errors(folder):
            return Version(name, folder, variant, *self._batch)

    def use(self, version: Version) -> None:
        """Put a version into service; the one before finishes what it has begun."""
        self._current[version.name] = version

    def unload(self, name: str) -> None:
        """Take a model out of service; `load` brings it back."""
        self._current.pop(name, None)

    def names(self) -> list[str]:
        """Return all names, in service or not."""
        return list(self._sources)

    def find(self, name: str | None = None, version: str | None = None) -> Version:
        """Return the version in service, of the first model when no name is given.

        Raises:
            Refused: there is no such model or version (404), or it is not in service (503).
        """
        name = next(iter(self._sources)) if name is None else name
        if name not in self._sources:
            raise Refused(404, "there is no such model here")
        found = self._current.get(name)
        if found is None:
            raise Refused(503, f"{name} is not in service", RETRY)
        if version is not None and version != found.version:
            raise Refused(404, f"{name} is here in version {found.version} only")
        return found

    def reads(self, name: str | None = None) -> str:
        """Return what a model reads: text, image or audio; text where there is no such model."""
        version = self._current.get(name if name is not None else next(iter(self._sources), ""))
        return version.task.modality if version else "text"

    def in_service(self) -> dict[str, Version]:
        """Return name → version, in the order in which they were named."""
        return {name: self._current[name] for name in self._sources if name in self._current}

    @property
    def ready(self) -> bool:
        """Whether any model is in service."""
        return bool(self._current)


def named_sources(arguments: Sequence[str]) -> dict[str, tuple[Path, str | None]]:
    """Parse `[NAME=]FOLDER[:VARIANT]` into name → (folder, variant).

    Without a name it is the run's or folder's own: `runs/tickets/artifact` is `tickets`.

    Raises:
        SpecError: a name is unfit for a URL, or stands twice.
    """
    found: dict[str, tuple[Path, str | None]] = {}
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        if not equals:
            name, rest = "", argument
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
