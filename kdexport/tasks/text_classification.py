"""Text classification: one label, several labels, or a number (regression) for a text or a pair of texts."""

from typing import ClassVar

from kdexport.tasks.base import Task
from kdexport.tasks.card import PREDICT, Card
from kdexport.tasks.classes import Classes
from kdexport.tasks.config import Row
from kdexport.tasks.inputs.texts import Texts
from kdexport.tasks.menus import OF_LAYERS, TEXTS
from kdexport.tasks.several import Number, SeveralLabels

_NUMBER = TEXTS._replace(bases=True)
_LABELS = _NUMBER._replace(teachers=TEXTS.teachers | {"zero-shot", "endpoint", "answers"})


class TextClassification(Texts, Classes):
    """Rows `{"text": …, "text_pair": …, "label": …}` → input ids → logits [N, C] → one label each."""

    name: ClassVar = "text-classification"
    menu: ClassVar = _LABELS
    card: ClassVar = Card(
        "text-classification", "ORTModelForSequenceClassification", PREDICT.format("a text to classify")
    )
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "content", "utterance", "query", "review", "message", "body", "document"),
        "label": ("label", "labels", "category", "class", "intent", "topic", "sentiment", "target"),
    }
    pairs: ClassVar = True
    auto_class: ClassVar = "AutoModelForSequenceClassification"
    heads: ClassVar = ("ForSequenceClassification",)
    stands_for: ClassVar = ("bert", "BertForSequenceClassification")
    protocols: ClassVar = frozenset({"tei"})

    @classmethod
    def kinds(cls) -> dict[str, type[Task]]:
        return {kind.problem: kind for kind in (TextClassification, MultiLabelTexts, TextRegression)}


class MultiLabelTexts(SeveralLabels, TextClassification):
    """Any number of independent labels: those with a logit above 0."""

    menu: ClassVar = _LABELS._replace(losses=("bce", "mse", *OF_LAYERS))

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        missing = needs_label and row.get("label") is None  # an empty set of labels must be stated
        return "label is missing" if missing else Texts.check(row, max_chars, needs_label=False)


class TextRegression(Number, TextClassification):
    """A number: the one logit."""

    # Two texts are compared across layers: two narrow ones kept 40 % of the teacher on STS-B (docs/decisions.md).
    menu: ClassVar = _NUMBER._replace(default="spread:3", losses=("mse", *OF_LAYERS))
    columns: ClassVar = TextClassification.columns | {
        "label": (*TextClassification.columns["label"], "score", "rating")
    }
