"""Audio classification: one label for a recording."""

from __future__ import annotations

from typing import Any, ClassVar

from kdexport.tasks.base import Card
from kdexport.tasks.classes import Classes
from kdexport.tasks.inputs.audio import Sounds
from kdexport.tasks.menus import MEDIA


class AudioClassification(Sounds, Classes):
    """Rows `{"audio": …, "label": …}` → waveform [N, T] or log-mel bands [N, T, M] → logits [N, C] → one label each."""

    name: ClassVar = "audio-classification"
    menu: ClassVar = MEDIA
    card: ClassVar = Card(
        "audio-classification",
        "ORTModelForAudioClassification",
        '\nmodel = kdexport.load("path/to/this/folder")\nmodel.predict(["a.wav"])',
    )
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "audio": ("audio", "file_name", "file", "path", "audio_path", "wav"),
        "label": ("label", "labels", "category", "class", "target", "intent_class"),
    }
    auto_class: ClassVar = "AutoModelForAudioClassification"
    heads: ClassVar = ("ForAudioClassification", "ForSequenceClassification")  # Wav2Vec2 has the latter
    exporter: ClassVar = "audio-classification"
    stands_for: ClassVar = ("audio-spectrogram-transformer", "ASTForAudioClassification")

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        taken = cls.taken(row)
        return taken if isinstance(taken, str) else Classes.canonical(taken)
