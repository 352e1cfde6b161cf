"""A task that kdexport does not have: is the sum of some whole numbers high or low?"""

from typing import Any, ClassVar

from kdexport.errors import DataError
from kdexport.tasks.card import Card
from kdexport.tasks.classes import Classes
from kdexport.tasks.menus import TEXTS
from kdexport.tasks.text_classification import TextClassification


class NumberSums(TextClassification):
    """Rows `{"numbers": [3, 14, 15], "label": "high"}` → logits [N, C] → one label each."""

    name: ClassVar = "number-sums"
    columns: ClassVar = {"text": ("numbers",), "label": ("label",)}
    menu: ClassVar = TEXTS._replace(default="bag", losses=("mse", "kl"), augment=False)
    card: ClassVar = Card("text-classification", "ORTModelForSequenceClassification", "model.predict([[3, 14, 15]])")
    pairs: ClassVar = False
    protocols: ClassVar = frozenset()

    @classmethod
    def kinds(cls) -> dict[str, type[Any]]:
        return {cls.problem: cls}

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        numbers = row["text"]
        if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
            return "its numbers are no list of whole numbers"
        return Classes.canonical(row | {"text": " ".join(map(str, numbers))})

    def row(self, given: object) -> dict[str, Any]:
        row = self.canonical({"text": given, "label": None})
        if isinstance(row, str):
            raise DataError(row)
        return row
