"""Speech recognition by connectionist temporal classification: a character, or a blank, at each step of time.

Graves et al. 2006 (https://www.cs.toronto.edu/~graves/icml_2006.pdf): the most probable path is read without
repetitions and blanks. A teacher's answer is a path as well, so teachers with other steps of time teach by their text.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import ClassVar

import numpy as np

from kdexport.tasks.base import Objective, Task
from kdexport.tasks.card import Card
from kdexport.tasks.config import NO_LABEL, Arrays, Row, TaskConfig
from kdexport.tasks.inputs.audio import FRAME, HOP, seconds_of
from kdexport.tasks.inputs.media import Encoded, bytes_of
from kdexport.tasks.inputs.recordings import read_header
from kdexport.tasks.inputs.transcripts import normalised
from kdexport.tasks.menus import SPEECH
from kdexport.tasks.metrics import Array, log_softmax
from kdexport.tasks.speech import Speech
from kdexport.tasks.speech_seq2seq import SpeechSeq2Seq
from kdexport.tasks.transcripts import BLANK, NEVER, Transcript, Word
from kdexport.tasks.wordlist import WordList

# Wav2Vec2's convolutions read 400 at once, and its masks in training hide ten steps of 320.
_FEWEST_SAMPLES = 4_000


class SpeechRecognition(Speech):
    """Rows `{"audio": …, "label": …}` → log-mel bands [N, T, M] or waveform [N, T] → logits [N, T', V] → a text each.

    `label` is the transcript, and `config.labels` are the characters, blank first. Where `config.words` has words, the
    most probable path of these is read.
    """

    objective: ClassVar[Objective] = "ctc"
    menu: ClassVar = SPEECH
    card: ClassVar = Card(
        "automatic-speech-recognition",
        "ORTModelForCTC",
        '\nmodel = kdexport.load("path/to/this/folder")\nmodel.predict(["order.flac"])',
    )
    auto_class: ClassVar = "AutoModelForCTC"
    heads: ClassVar = ("ForCTC",)
    stands_for: ClassVar = ("wav2vec2", "Wav2Vec2ForCTC")

    def restrict(self, words: Iterable[str]) -> None:
        self._words = WordList(words, self.labels)

    @cached_property
    def _words(self) -> WordList | None:
        return WordList(self.config.words, self.labels) if self.config.words else None

    @classmethod
    def kinds(cls) -> dict[str, type[Task]]:
        return {kind.problem: kind for kind in (SpeechRecognition, SpeechSeq2Seq)}

    @classmethod
    def of(cls, config: TaskConfig) -> type[Task]:
        return SpeechSeq2Seq if config.decoder else SpeechRecognition

    # --- rows

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        return [BLANK, *sorted(labels)]

    @classmethod
    def content(cls, row: Row) -> str:
        """The recording, and where the teacher's transcript was mended, that."""
        return super().content(row) + (f":{row['label']}" if row.get("heard") else "")

    # --- rows → arrays

    @property
    def alone(self) -> bool:  # type: ignore[override] # of waveforms
        """Wav2Vec2 and its kin norm each channel over all samples, those of the padding too."""
        return not self._how.mels

    def compact(self, content: bytes) -> Array:
        """float32 [T], or [T, mels], as long as the recording; a waveform has as many samples as the model needs."""
        return self._features(content, 0 if self._how.mels else _FEWEST_SAMPLES)

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Batch, padded with exact zeros, by which a network knows that a recording has ended."""
        name = self.config.inputs[0]
        arrays = [one[name] for one in encoded]
        batch = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), np.float32)
        for place, array in zip(batch, arrays, strict=True):
            place[: len(array)] = array
        return {name: batch}

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        """Frames or samples; of rows that are not encoded yet by their headers."""
        if isinstance(encoded, Encoded):
            return [self._frames(row) for row in encoded.rows]
        return [len(arrays[self.config.inputs[0]]) for arrays in encoded]

    def _frames(self, row: Row) -> int:
        samples = read_header(bytes_of(row["audio"]), self._read).seconds * self._how.rate
        frames = 1 + max(0, int(samples) - FRAME) // HOP if self._how.mels else int(samples)
        return min(frames, self._how.length)

    def shapes(self) -> dict[str, list[int]]:
        return {self.config.inputs[0]: [-1, -1, *([self._how.mels] if self._how.mels else [])]}

    def axes(self) -> dict[str, dict[int, str]]:
        return {
            self.config.inputs[0]: {0: "batch_size", 1: "sequence_length"},
            self.output: {0: "batch_size", 1: "steps"},
        }

    # --- outputs → answers

    @property
    def answer_shape(self) -> tuple[int, ...]:
        return self._how.steps, len(self.labels)

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """Pad logits [B, t, V] with certain blanks."""
        logits = np.full((len(output), *self.answer_shape), NEVER, np.float32)
        logits[..., 0] = 0.0
        logits[:, : output.shape[1]] = output[:, : self._how.steps]
        return logits

    def known(self, row: Row) -> Array | None:
        return self.target_of(row["label"]) if row.get("heard") else None

    def target_of(self, text: str) -> Array:
        """Return the logits [T', V] of a path that spells a text, as far as steps and labels reach."""
        index = {character: i for i, character in enumerate(self.labels)}
        steps = list[int]()
        for character in normalised(text):
            label = index.get(character, 0)
            steps += [0, label] if steps and steps[-1] == label else [label]
        path = np.full(self.answer_shape, NEVER, np.float32)
        steps = [*steps, *[0] * len(path)][: len(path)]
        path[np.arange(len(path)), steps] = 0.0
        return path

    def texts(self, logits: Array) -> list[str]:
        """Return the text of the most probable path of each row."""
        spelled = ("".join(c for c, _, _ in self._characters(self._path(one))) for one in logits)
        return [" ".join(text.split()) for text in spelled]

    def decode(self, logits: Array, rows: Sequence[Row] = ()) -> list[Transcript]:
        return [self._transcript(one) for one in logits]

    def _transcript(self, logits: Array) -> Transcript:
        """Read a path: characters, and words with the times of their first and last one."""
        path = self._path(logits)
        logs = log_softmax(logits)[np.arange(len(path)), path]
        spoken = self._characters(path)
        step = seconds_of(self._how) / self._how.steps
        words = []
        for is_space, group in groupby(spoken, lambda one: one[0] == " "):
            if not is_space:
                letters, firsts, lasts = zip(*group, strict=True)
                words.append(Word("".join(letters), round(firsts[0] * step, 3), round(lasts[-1] * step, 3)))
        heard = [logs[start:end].mean() for _, start, end in spoken]
        score = float(np.exp(np.mean(heard))) if heard else float(np.exp(logs.mean()))
        return Transcript(" ".join(word.word for word in words), score, words)

    def _path(self, logits: Array) -> Array:
        """Return the label of each step of logits [T', V]; a transcript's own path has words beyond the listed ones."""
        is_transcript = np.count_nonzero(logits == NEVER) == logits.size - len(logits)
        return self._words.path(logits) if self._words and not is_transcript else np.asarray(logits.argmax(axis=1))

    def _characters(self, path: Array) -> list[tuple[str, int, int]]:
        """Return each character of a path with its first step and the one behind its last."""
        changes = np.flatnonzero(np.diff(path, prepend=-1))
        ends = [*changes[1:].tolist(), len(path)]
        found = zip(changes.tolist(), ends, path[changes].tolist(), strict=True)
        return [(self.labels[label], start, end) for start, end, label in found if label]

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """The mean probability of each row's characters."""
        return np.array([self._transcript(one).score for one in logits])

    def label_array(self, rows: Iterable[Row]) -> Array:
        """Characters int64 [N, L], −1 behind the last one; a row without a transcript has −100 alone."""
        index = {character: i for i, character in enumerate(self.labels)}
        texts = [None if row.get("label") is None else [index[c] for c in row["label"] if c in index] for row in rows]
        labels = np.full((len(texts), max((len(text) for text in texts if text), default=1)), -1, np.int64)
        for place, text in zip(labels, texts, strict=True):
            place[: 0 if text is None else len(text)] = text or []
            place[:] = NO_LABEL if text is None else place
        return labels
