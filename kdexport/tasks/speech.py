"""The input side of speech recognition: recordings that a model reads whole, or not at all."""

from pathlib import Path
from typing import Any, ClassVar

from kdexport.errors import TooLarge
from kdexport.tasks.config import Row
from kdexport.tasks.inputs.audio import Sounds
from kdexport.tasks.inputs.media import bytes_of
from kdexport.tasks.inputs.recordings import read_header
from kdexport.tasks.transcripts import Transcripts


class Speech(Sounds, Transcripts):
    """Rows `{"audio": …, "label": …}`, whose label is the transcript."""

    name: ClassVar = "automatic-speech-recognition"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "audio": ("audio", "file_name", "file", "path", "audio_path", "wav"),
        "label": ("text", "transcript", "transcription", "sentence", "normalized_text"),
    }

    def row(self, given: object) -> dict[str, Any]:  # type: ignore[override] # it depends on the model
        value = str(given) if isinstance(given, Path) else given
        self._refuse_longer({"audio": value})  # before it is decoded
        return super().row(value)

    def seconds(self, row: Row) -> float:
        self._refuse_longer(row)
        return super().seconds(row)

    def _refuse_longer(self, row: Row) -> None:
        """Refuse what is longer than the model reads: its text would lack words."""
        lasts = read_header(bytes_of(row["audio"])).seconds
        if lasts > self.longest:
            raise TooLarge(f"it lasts {lasts:.1f} s; the model reads {self.longest:.1f}", "Cut it")
