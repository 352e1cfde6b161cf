"""Image classification: one label for an image."""

from typing import ClassVar

from kdexport.tasks.card import PREDICT, Card
from kdexport.tasks.classes import Classes
from kdexport.tasks.inputs.images import Images
from kdexport.tasks.menus import MEDIA


class ImageClassification(Images, Classes):
    """Rows `{"image": …, "label": …}` → pixel values [N, channels, height, width] → logits [N, C] → one label each."""

    name: ClassVar = "image-classification"
    menu: ClassVar = MEDIA
    card: ClassVar = Card("image-classification", "ORTModelForImageClassification", PREDICT.format("a.png"))
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("image", "img", "file_name", "file", "path", "image_path"),
        "label": ("label", "labels", "category", "class", "target", "fine_label"),
    }
    auto_class: ClassVar = "AutoModelForImageClassification"
    heads: ClassVar = ("ForImageClassification",)
    stands_for: ClassVar = ("resnet", "ResNetForImageClassification")
