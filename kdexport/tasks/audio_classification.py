"""Audio classification: one label for a recording."""

from typing import ClassVar

from kdexport.tasks.card import PREDICT, Card
from kdexport.tasks.classes import Classes
from kdexport.tasks.inputs.audio import Sounds
from kdexport.tasks.menus import MEDIA


class AudioClassification(Sounds, Classes):
    """Rows `{"audio": …, "label": …}` → waveform [N, T] or log-mel bands [N, T, M] → logits [N, C] → one label each."""

    name: ClassVar = "audio-classification"
    menu: ClassVar = MEDIA
    card: ClassVar = Card("audio-classification", "ORTModelForAudioClassification", PREDICT.format("a.wav"))
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "audio": ("audio", "file_name", "file", "path", "audio_path", "wav"),
        "label": ("label", "labels", "category", "class", "target", "intent_class"),
    }
    auto_class: ClassVar = "AutoModelForAudioClassification"
    heads: ClassVar = ("ForAudioClassification", "ForSequenceClassification")  # Wav2Vec2 has the latter
    stands_for: ClassVar = ("audio-spectrogram-transformer", "ASTForAudioClassification")
