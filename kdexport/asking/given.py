"""Stored answers: the probabilities of labels by text, a JSON line each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport.asking.reading import Reading
from kdexport.errors import ModelError, counted
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array

# No answer is surer than this: a file has rounded numbers, and votes of a few.
_SUREST = 0.999


class Line(msgspec.Struct):
    """`{"text": …, "text_pair": …, "labels": {name: probability}}`, or one `label` in place of `labels`."""

    text: str
    text_pair: str | None = None
    labels: dict[str, float] | None = None
    label: str | None = None

    def probabilities(self) -> dict[str, float]:
        """Return label → probability, 1 for a single label."""
        return self.labels or ({self.label: 1.0} if self.label else {})


class Given:
    """A file of answers as a function of rows."""

    def __init__(self, path: Path, labels: Sequence[str], task: type[Task]) -> None:
        several = not task.one_label
        self._task, self._logits = task, dict[str, Array]()
        for number, line in _lines(path):
            found = line.probabilities()
            if strange := sorted(found.keys() - {*labels}):
                raise ModelError(
                    f"{path.name}, row {number}: label {strange[0]!r} is none of the data's labels",
                    f"They are: {', '.join(labels[:8])}",
                )
            values = np.array([found.get(label, 0.0) for label in labels])
            fits = values.max() <= 1 if several else values.sum() > 0  # counts of votes are probabilities, too
            if not (np.isfinite(values).all() and (values >= 0).all() and fits):
                raise ModelError(f"{path.name}, row {number}: its probabilities are none", "Give each label 0 to 1")
            row = {"text": line.text, "text_pair": line.text_pair}
            self._logits[task.content(row)] = as_logits(values, several=several)

    def read(self, rows: Sequence[Mapping[str, Any]], title: str) -> list[Reading]:
        """Return the stored answer to each row; those without one say so."""
        found = (self._logits.get(self._task.content(row)) for row in rows)
        return [Reading(logits, 1.0, "" if logits is not None else "no stored answer", "") for logits in found]


def as_logits(probabilities: Array, *, several: bool) -> Array:
    """Return logits float32 [C] for probabilities [C], none surer than 99.9 %; `several` are independent."""
    if several:
        p = np.clip(probabilities, 1 - _SUREST, _SUREST)
        return np.asarray(np.log(p / (1 - p)), np.float32)
    p = probabilities / probabilities.sum()
    return np.asarray(np.log(np.maximum(p, (1 - _SUREST) / len(p))), np.float32)


def labels_of(path: Path) -> list[str]:
    """Return the labels of a file of answers, sorted; raise ModelError where there are no two."""
    found = sorted({label for _, line in _lines(path) for label in line.probabilities()})
    if len(found) < 2:
        raise ModelError(f"teacher {path}: its answers name {counted(len(found), 'label')}", "Name all with --labels")
    return found


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    decoder = msgspec.json.Decoder(Line)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, decoder.decode(line)
    except OSError as error:
        raise ModelError(f"teacher {path} can't be read: {error.strerror}", "Check the path") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        fix = 'Write a line like {"text": "…", "labels": {"praise": 0.9, "delay": 0.1}}'
        raise ModelError(f"{path.name}, row {number}: {error}", fix) from None
