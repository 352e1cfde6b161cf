"""Image classification: one label for a picture."""

from __future__ import annotations

from typing import Any, ClassVar

from kdexport.tasks.classes import Classes
from kdexport.tasks.inputs.images import Images


class ImageClassification(Images, Classes):
    """Rows `{"image": …, "label": …}` → pixel values [N, channels, height, width] → logits [N, C] → one label each."""

    name: ClassVar = "image-classification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("image", "img", "file_name", "file", "path", "image_path"),
        "label": ("label", "labels", "category", "class", "target", "fine_label"),
    }

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        """A row whose picture was read, its label a text; or what is wrong with it."""
        taken = cls.taken(row)
        return taken if isinstance(taken, str) else Classes.canonical(taken)
