"""Speech recognition by an encoder and a decoder that writes the text token by token, as Whisper does.

Radford et al. 2022 (https://arxiv.org/abs/2212.04356). A row's output is packed like a language model's (`packed`), a
line for each written token: its log probability, then the most probable tokens with theirs, the written one first.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from tokenizers import Tokenizer

from kdexport.errors import ArtifactError, DataError
from kdexport.tasks.base import Objective
from kdexport.tasks.card import Card
from kdexport.tasks.config import NO_LABEL, Arrays, DecoderConfig, Row, TaskConfig, read_config
from kdexport.tasks.inputs.media import Encoded, bytes_of
from kdexport.tasks.inputs.recordings import read_header
from kdexport.tasks.inputs.texts import padded
from kdexport.tasks.inputs.transcripts import normalised
from kdexport.tasks.inputs.whisper import HOP, log_mels
from kdexport.tasks.menus import SEQ2SEQ
from kdexport.tasks.metrics import Array, log_softmax
from kdexport.tasks.packed import BEST, LOG_P, packed_lines
from kdexport.tasks.speech import Speech
from kdexport.tasks.transcripts import NEVER, Transcript

# Tokens int64 [B, n] and a cache of those before → logits [B, n, V] and the extended cache.
Read = Callable[[Array, Any], tuple[Array, Any]]

# OpenAI's `transcribe` takes a recording for silence where both hold.
_SILENT, _UNSURE = 0.6, -1.0
# The probability of all other tokens together beside one of a transcript; losses of packed outputs read no less.
_REST = 1e-6
# So many last tokens that repeat with a period of at most so many are a loop.
_LOOP, _LONGEST_PERIOD = 24, 8


class SpeechSeq2Seq(Speech):
    """Rows `{"audio": …, "label": …}` → log-mel bands [N, M, T] → tokens [N, max_length, 1 + 2k] → a text each."""

    problem: ClassVar = "seq2seq"
    objective: ClassVar[Objective] = "next-token"
    menu: ClassVar = SEQ2SEQ
    card: ClassVar = Card(
        "automatic-speech-recognition",
        "ORTModelForSpeechSeq2Seq",
        '\nmodel = kdexport.load("path/to/this/folder")\nmodel.predict(["order.flac"])',
    )
    auto_class: ClassVar = "AutoModelForSpeechSeq2Seq"
    heads: ClassVar = ("WhisperForConditionalGeneration",)
    has_labels: ClassVar = False
    has_names: ClassVar = False
    at_once: ClassVar = 8

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        assert config.decoder
        assert config.end_id is not None
        self._decoder: DecoderConfig = config.decoder
        self._end: int = config.end_id
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = read_config(folder)
        try:
            return cls(config, Tokenizer.from_file(str(folder / "tokenizer.json")))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{folder}/tokenizer.json can't be read: {error}") from None

    # --- rows

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        return ""  # recordings are a sign of CTC, which needs no teacher of this kind

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return set()

    def restrict(self, words: Iterable[str]) -> None:
        raise DataError("a list of words is of recognisers that spell; this model writes any text", "Leave it out")

    def unknown(self, row: Row) -> set[str]:
        return set()

    # --- rows → arrays

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        """Return bands, and for training the tokens of transcripts."""
        name = self.config.inputs[0]
        return Encoded(rows, lambda row: {name: self._compact(row)} | self.tokens(row))

    def compact(self, content: bytes) -> Array:
        """float32 [W, mels, length], by window, the last padded with silence."""
        how, needed = self._how, math.ceil(self.longest * self._how.rate)
        with self._samples(content, self.longest + 1, needed) as samples:
            starts = self._starts(len(samples))
            return np.stack([log_mels(samples[at : at + self._window], how.mels, how.length) for at in starts])

    @property
    def longest(self) -> float:
        return max(self._decoder.seconds, self._window / self._how.rate)

    @property
    def _window(self) -> int:
        return self._how.length * HOP

    def _starts(self, samples: int) -> list[int]:
        """Return where each window starts; what is within a sixth of both edges is heard by two."""
        step = self._window - 2 * (self._window // 6)
        return [0, *range(step, samples - 2 * (self._window // 6), step)] if samples > self._window else [0]

    def windows(self, row: Row) -> int:
        """Return how many windows a recording fills."""
        return len(self._starts(int(read_header(bytes_of(row["audio"])).seconds * self._how.rate)))

    def encode(self, rows: Sequence[Row]) -> Arrays:
        return self.collate(list(self.tokenize(rows)))

    def tokens(self, row: Row) -> Arrays:
        """Return a row's tokens, int64 [n] with the end: those in `tokens`, or its transcript's; none without one."""
        ids = row.get("tokens")
        if ids is None and row.get("label") is None:
            return {}
        if ids is None:
            ids = self._tokenizer.encode(f" {row['label']}", add_special_tokens=False).ids
        return {"tokens": np.array([*ids[: self._decoder.most - 1], self._end])}

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Batch all windows, with their number by row; in training what the decoder reads and `places` that predict."""
        if (name := self.config.inputs[0]) in encoded[0]:
            counts = np.array([len(one[name]) for one in encoded])
            return {name: np.concatenate([one[name] for one in encoded]), "windows": counts}
        batch = {"heard": np.stack([one["heard"] for one in encoded])}
        if not all("tokens" in one for one in encoded):
            return batch
        start, most = self._decoder.start, max(len(one["tokens"]) for one in encoded)
        read = np.full((len(encoded), len(start) + most - 1), self._end)
        read[:, : len(start)] = start
        places = np.full((len(encoded), most), -1)
        for i, one in enumerate(encoded):
            count = len(one["tokens"])
            read[i, len(start) : len(start) + count - 1] = one["tokens"][:-1]
            places[i, :count] = len(start) - 1 + np.arange(count)
        return batch | {"decoder_input_ids": read, "places": places}

    def shapes(self) -> dict[str, list[int]]:
        return {self.config.inputs[0]: [-1, self._how.mels, self._how.length]}

    def axes(self) -> dict[str, dict[int, str]]:
        return {self.config.inputs[0]: {0: "batch_size"}, self.output: {0: "batch_size"}}

    # --- writing

    def write(self, read: Read, rows: int, *, loops: bool = False) -> Array:
        """Write a text for each of a batch's rows greedily; return it packed, float32 [B, n, 1 + 2k].

        A text ends where it begins to loop; with `loops` it goes on, so that it can be judged by them. Nothing is
        written where silence is probable and the text is not.
        """
        packed = self.nothing(rows, self._decoder.most)
        texts: list[list[int]] = [[] for _ in range(rows)]
        logits, cache = read(np.array([self._decoder.start]).repeat(rows, axis=0), None)
        silent = self._silent(logits[:, 0])
        going = list(range(rows))
        for place in range(self._decoder.most):
            last = np.array(logits[:, -1], np.float32)
            last[:, self._end + 1 :] = -np.inf  # what comes behind the end are marks, and no text
            last[:, self._decoder.never if place else self._decoder.never + self._decoder.never_first] = -np.inf
            logs = log_softmax(last)
            chosen = logs.argmax(axis=1)
            for i in [*going]:
                texts[i].append(int(chosen[i]))
                packed[i, place] = packed_lines(logs[i : i + 1], chosen[i : i + 1], self.config.kept, texts[i])[0]
                if period := 0 if loops else _period(texts[i]):
                    packed[i, len(texts[i]) - _LOOP + period :] = self.nothing(1, 1)[0, 0]
                if period or chosen[i] == self._end:
                    going.remove(i)
            if not going:
                break
            if place + 1 < self._decoder.most:
                logits, cache = read(chosen[:, None], cache)
        sure = np.log(self._score(packed)) >= _UNSURE
        packed[silent & ~sure] = self.nothing(1, 1)[0]
        return packed

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """Join the texts of each row's windows: [ΣW, n, 1 + 2k] → [B, max_length, 1 + 2k]."""
        counts = arrays.get("windows", np.ones(len(output), int))
        packed, first = self.nothing(len(counts), self.config.max_length), 0
        for i, count in enumerate(counts.tolist()):
            lines = output[first, : 1 + len(self.ids_of(output[first]))]
            for part in output[first + 1 : first + count]:
                keep, skip = _seam(self.ids_of(lines), self.ids_of(part))
                lines = np.concatenate([lines[:keep], part[skip : 1 + len(self.ids_of(part))]])
            packed[i, : len(lines)] = lines[: self.config.max_length]
            first += count
        return packed

    def nothing(self, rows: int, length: int) -> Array:
        """Return the packed output of rows without speech, [N, length, 1 + 2k]."""
        packed = np.full((rows, length, 1 + 2 * self.config.kept), NEVER, np.float32)
        packed[..., 1::2] = self._end
        packed[..., LOG_P] = packed[..., BEST + 1] = 0.0
        return packed

    def target_of(self, text: str) -> Array:
        """Return a line for each token of a text, with a probability of nearly 1."""
        packed: Array = self.nothing(1, self.config.max_length)[0]
        tokens, vocabulary = self.tokens({"label": text})["tokens"], self._tokenizer.get_vocab_size()
        logs = np.full((len(tokens), vocabulary), math.log(_REST / vocabulary), np.float32)
        logs[np.arange(len(tokens)), tokens] = 0.0
        packed[: len(tokens)] = packed_lines(logs, tokens, self.config.kept, tokens.tolist())
        return packed

    def _silent(self, logits: Array) -> Array:
        if self._decoder.silence is None:
            return np.zeros(len(logits), bool)
        return np.asarray(np.exp(log_softmax(logits)[:, self._decoder.silence]) > _SILENT)

    # --- outputs → answers

    @property
    def answer_shape(self) -> tuple[int, ...]:
        return self.config.max_length, 1 + 2 * self.config.kept

    def ids_of(self, packed: Array) -> list[int]:
        """Return the tokens of one row's output [max_length, 1 + 2k], without the end."""
        ids: list[int] = packed[:, BEST].astype(int).tolist()
        return ids[: ids.index(self._end)] if self._end in ids else ids

    def raw(self, logits: Array) -> list[str]:
        """Return each row's text as it was written, with its punctuation and capitals."""
        return [self._tokenizer.decode(self.ids_of(one), skip_special_tokens=True).strip() for one in logits]

    def texts(self, logits: Array) -> list[str]:
        return [normalised(text) for text in self.raw(logits)]

    def decode(self, logits: Array, rows: Sequence[Row] = ()) -> list[Transcript]:
        scores = self._score(logits).tolist()
        return [Transcript(text, score, []) for text, score in zip(self.raw(logits), scores, strict=True)]

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """The geometric mean of each row's token probabilities."""
        return self._score(logits)

    def _score(self, logits: Array) -> Array:
        lengths = [min(1 + len(self.ids_of(one)), len(one)) for one in logits]
        sums = [one[:count, LOG_P].astype(np.float64).mean() for one, count in zip(logits, lengths, strict=True)]
        return np.asarray(np.exp(np.array(sums).reshape(-1)))

    def difference(self, logits: Array, reference: Array) -> float:
        """max |Δp| of the tokens up to the first that differs: behind it, both go on with other texts."""
        one, other = np.exp(logits[..., LOG_P]), np.exp(reference[..., LOG_P])
        apart = np.cumsum(logits[..., BEST] != reference[..., BEST], axis=1)
        first = np.pad(apart, ((0, 0), (1, 0)))[:, :-1] == 0
        return float((np.abs(one - other) * first).max(initial=0.0))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """The tokens with the end, int64 [N, max_length]; −100, the index that losses ignore, elsewhere."""
        labels = [self.tokens(row).get("tokens", np.zeros(0, np.int64)) for row in rows]
        return padded(labels, self.config.max_length, NO_LABEL)


def _seam(left: Sequence[int], right: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens of a text to keep, and how many of the next to leave out, where windows overlap.

    Of all ways to lay the begin of one over the end of the other, the one with most equal tokens for its length counts,
    and the texts are joined in its middle: both are least sure at their edges.
    """
    best, found = 0.0, (len(left), 0)
    for size in range(2, min(len(left), len(right)) + 1):
        equal = sum(a == b for a, b in zip(left[-size:], right[:size], strict=True))
        score = equal / size + size * 1e-4  # of equal ones the longest
        if equal > 1 and score > best:
            best, found = score, (len(left) - size + size // 2, size // 2)
    return found


def _period(ids: Sequence[int]) -> int:
    """Return the period of a loop at the end of a text, or 0."""
    tail = ids[-_LOOP:]
    if len(tail) < _LOOP:
        return 0
    return next((p for p in range(1, _LONGEST_PERIOD + 1) if tail[p:] == tail[:-p]), 0)
