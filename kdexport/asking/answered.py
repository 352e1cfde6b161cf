"""Answers by content, and the task that judges them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from kdexport import spec
from kdexport.analysis.duplicates import first_of_each, keys_of
from kdexport.asking.reading import Reading
from kdexport.data import read_summary
from kdexport.data.rows import Row, Rows
from kdexport.distill.combine import sure_of
from kdexport.tasks import task_class
from kdexport.tasks.base import Task
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.metrics import Array

# Rows and a title of the progress → the answer to each.
Read = Callable[[Sequence[Row], str], list[Reading]]


class Answered:
    """A teacher's answers by content; a person's corrections need none, and replace it."""

    def __init__(self, task: Task, corrected: Mapping[str, str], read: Read) -> None:
        self._task, self._read = task, read
        self._corrected, self.temperature = corrected, 1.0
        given = sure_of(task, [{"label": label} for label in corrected.values()]) if corrected else ()
        self.logits = dict(zip(corrected, given, strict=True))
        self.unanswered: dict[str, str] = {}
        self.guessed: dict[str, Array] = {}  # by a first student, of texts that were not asked

    def of(self, rows: Sequence[Row], title: str = "ask") -> list[Row]:
        """Ask what was not asked, and return the rows that have an answer."""
        key = self._task.content
        missing = {content: row for row in rows if (content := key(row)) not in self.logits}
        new = [row for content, row in missing.items() if content not in self.unanswered]
        for row, reading in zip(new, self._read(new, title) if new else (), strict=True):
            if reading.logits is None:
                self.unanswered[key(row)] = reading.why
            else:
                self.logits[key(row)] = reading.logits
        return [row for row in rows if key(row) in self.logits]

    def array(self, rows: Sequence[Row]) -> Array:
        """Return the logits of answered rows, and of those that a first student labelled: float32 [N, C]."""
        found = [self._logits(self._task.content(row)) for row in rows]
        return np.stack(found) if found else np.empty((0, len(self._task.labels)), np.float32)

    def _logits(self, content: str) -> Array:
        if content in self._corrected:
            return np.asarray(self.logits[content])
        found = self.guessed if content in self.guessed else self.logits
        return np.asarray(found[content] / self.temperature, np.float32)


def judge(settings: spec.Spec, data: Path) -> Task:
    """Return the task with the labels of a data stage, which can judge answers and read no texts."""
    kind, labels = task_class(settings.task, settings.data.problem), read_summary(data).labels
    config = TaskConfig(task=settings.task, labels=labels, inputs=[], max_length=8, function=kind.function)
    return cast(Task, cast(Any, kind)(config, Tokenizer(BPE())))


def distinct(task: Task, rows: Rows) -> Rows:
    """Return the first row of each content."""
    return rows.take(first_of_each(keys_of(rows, task.content)))
