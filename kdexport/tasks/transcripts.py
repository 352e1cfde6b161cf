"""The output side of tasks whose answer is what was said: word error rate, and the answers' form."""

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from kdexport.tasks.base import Task
from kdexport.tasks.config import Function, Row
from kdexport.tasks.inputs.transcripts import edits, normalised
from kdexport.tasks.metrics import Array, Metric

BLANK = "<pad>"  # as Wav2Vec2's vocabularies call it
# The logit of every other character at a step behind the recording's end, where blank has 0.
NEVER = -30.0
# A teacher that gets more words wrong than this knows nothing of the language.
_CHANCE = 0.9


class Word(msgspec.Struct, frozen=True):
    """A word, and when it was said, in seconds."""

    word: str
    start: float
    end: float


class Transcript(msgspec.Struct, frozen=True):
    """The text; the mean probability of its characters; its words with their times."""

    text: str
    score: float
    words: list[Word]

    def to_dict(self, scores: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"text": self.text, "score": round(self.score, 6)}
        return found | {"words": msgspec.to_builtins(self.words)} if scores else found


class Transcripts(Task):
    """A row's `label` is its transcript, in normal form."""

    metric: ClassVar = Metric("word error rate", higher_is_better=False)
    function: ClassVar[Function] = "none"
    transcribes: ClassVar = True
    label_word: ClassVar = "characters"

    def decode(self, logits: Array, rows: Sequence[Row]) -> Sequence[Transcript]:
        raise NotImplementedError

    def texts(self, logits: Array) -> list[str]:
        """Return the text of each row."""
        raise NotImplementedError

    @property
    def longest(self) -> float:
        """The seconds of the longest recording that is read."""
        raise NotImplementedError

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        text = row["label"]
        if text is not None and not isinstance(text, str):
            return f"its transcript {text!r} is no text"
        return row | {"label": None if text is None else normalised(text)}

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return {*(row["label"] or "")}

    def unknown(self, row: Row) -> set[str]:
        return {*normalised(row["label"] or "")} - {*self.labels}

    def target_of(self, text: str) -> Array:
        """Return the output [*answer_shape] of a teacher that is sure of a transcript."""
        raise NotImplementedError

    def corrected(self, logits: Array, rows: Sequence[Row], most: float) -> tuple[Array, int]:
        """Replace a teacher's text by the transcript where its word error rate is above `most`.

        Returns:
            The logits to teach by, and how many were corrected.
        """
        given = [i for i, row in enumerate(rows) if row["label"] is not None and not row.get("heard")]
        wrong = self.value(self.stats(logits[given], [rows[i] for i in given])) > most
        logits = logits.copy()
        for i in np.array(given, int)[wrong]:
            logits[i] = self.target_of(rows[i]["label"])
        return logits, int(wrong.sum())

    def agrees(self, logits: Array, reference: Array) -> Array:
        """bool [N]: the same text; the two may have other steps of time."""
        return np.array([a == b for a, b in zip(self.texts(logits), self.texts(reference), strict=True)])

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array:
        """bool [N]: the whole text is right."""
        truths = (normalised(row["label"]) for row in rows)
        return np.array([text == truth for text, truth in zip(self.texts(logits), truths, strict=True)])

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Substitutions, deletions, insertions and words of the transcript: float64 [N, 4]."""
        truths = (normalised(row["label"]).split() for row in rows)
        pairs = zip(truths, self.texts(logits), strict=True)
        return np.array([[*edits(truth, text.split()), len(truth)] for truth, text in pairs], np.float64).reshape(-1, 4)

    def value(self, sums: Array) -> Array:
        """Word error rate: (S + D + I) / words."""
        return np.asarray(sums[..., :3].sum(axis=-1) / np.maximum(sums[..., 3], 1))

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        return float(self.value(self.stats(logits, rows).sum(axis=0))) > _CHANCE

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """The three kinds of errors by word, and the character error rate."""
        *counts, words = self.stats(logits, rows).sum(axis=0)
        truths = [normalised(row["label"]) for row in rows]
        wrong = sum(sum(edits(truth, text)) for truth, text in zip(truths, self.texts(logits), strict=True))
        kinds = ("substitutions", "deletions", "insertions")
        found = {kind: float(count / max(words, 1)) for kind, count in zip(kinds, counts, strict=True)}
        return found | {"character error rate": wrong / max(sum(map(len, truths)), 1)}
