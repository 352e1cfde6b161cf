"""Text classification: for a text or a pair of texts one label, several labels, or a number (regression)."""

from __future__ import annotations

from typing import ClassVar

from kdexport.tasks.classes import Classes
from kdexport.tasks.config import Row
from kdexport.tasks.inputs.texts import Texts
from kdexport.tasks.several import Number, SeveralLabels


class TextClassification(Texts, Classes):
    """Rows `{"text": …, "text_pair": …, "label": …}` → input ids → logits [N, C] → one label each."""

    name: ClassVar = "text-classification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "content", "utterance", "query", "review", "message", "body", "document"),
        "label": ("label", "labels", "category", "class", "intent", "topic", "sentiment", "target"),
    }


class MultiLabelTexts(SeveralLabels, TextClassification):
    """Any number of labels, each by itself: those whose logit is above 0."""

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        """What is wrong with a row, or None; it may have no label, but that must be said."""
        missing = needs_label and row.get("label") is None
        return "label is missing" if missing else Texts.check(row, max_chars, needs_label=False)


class TextRegression(Number, TextClassification):
    """A number: the one logit."""
