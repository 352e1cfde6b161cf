"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

from typing import ClassVar

from kdexport.tasks.classes import Classes
from kdexport.tasks.texts import Texts


class TextClassification(Texts, Classes):
    """Rows `{"text": …, "text_pair": …, "label": …}` → input ids → logits [N, C] → one label each."""

    name: ClassVar = "text-classification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "content", "utterance", "query", "review", "message", "body", "document"),
        "label": ("label", "labels", "category", "class", "intent", "topic", "sentiment", "target"),
    }
