"""Audio classification: one label for a recording."""

from __future__ import annotations

from typing import Any, ClassVar

from kdexport.tasks.classes import Classes
from kdexport.tasks.inputs.audio import Sounds


class AudioClassification(Sounds, Classes):
    """Rows `{"audio": …, "label": …}` → waveform [N, T] or log-mel bands [N, T, M] → logits [N, C] → one label each."""

    name: ClassVar = "audio-classification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "audio": ("audio", "file_name", "file", "path", "audio_path", "wav"),
        "label": ("label", "labels", "category", "class", "target", "intent_class"),
    }

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        """A row whose recording was read, its label a text; or what is wrong with it."""
        taken = cls.taken(row)
        return taken if isinstance(taken, str) else Classes.canonical(taken)
