"""Texts and pairs of texts as a model reads them: rows → token ids → the arrays of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from tokenizers import Encoding, Tokenizer

from kdexport.errors import ArtifactError, DataError, ModelError
from kdexport.tasks.config import Arrays, Comparable, Row, TaskConfig, read_config
from kdexport.tasks.metrics import Array

# Where a text is cut before it is tokenised, in characters per token that is kept. English has about 5.
_CHARS_PER_TOKEN = 6
# What a token takes of a text, for estimates: of clinc150's and BBC's texts 99.7 % are within 40 % of the truth.
_ASCII_PER_TOKEN, _BYTES_PER_FOREIGN_TOKEN = 4.7, 2.5
# Input of a graph → attribute of an encoding.
_GIVEN = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class Texts(Comparable):
    """The side of a task that reads rows `{"text": …, "text_pair": …}`."""

    output: ClassVar = "logits"
    reads: ClassVar = "text"
    at_once: ClassVar = 32

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.labels = config.labels
        self._tokenizer = tokenizer
        # A tokenizer.json may come with padding and truncation of its own; ours are stated in the config.
        tokenizer.no_padding()
        tokenizer.enable_truncation(config.max_length)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open the task of a model folder (`task.json`) or an artifact (`kdexport.json`).

        Raises:
            ArtifactError: a file is missing or unreadable.
        """
        config = read_config(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{folder}/tokenizer.json can't be read: {error}") from None
        return cls(config, tokenizer)

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        """What is wrong with a row, or None."""
        for column in ("text", "text_pair"):
            value = row.get(column)
            if value is None and column == "text_pair":
                continue
            if not isinstance(value, str):
                return f"{column} is {'missing' if value is None else f'no text but {type(value).__name__}'}"
            if not value.strip():
                return f"{column} is empty"
            if len(value) > max_chars:
                return f"{column} has {len(value):,} characters (a quote left open?)"
        if needs_label and row.get("label") in (None, ""):
            return "label is empty"
        return None

    @staticmethod
    def content(row: Row) -> str:
        """What a model sees of a row; rows with equal content get equal logits."""
        return "\x1f".join(filter(None, (row["text"], row.get("text_pair"))))

    @staticmethod
    def title(row: Row) -> str:
        """What a row is called in reports: its texts."""
        return " ‖ ".join(filter(None, (row["text"], row.get("text_pair"))))

    @staticmethod
    def row(given: object) -> dict[str, Any]:
        """The row of what a caller wants answered: a text, or a pair of texts.

        Raises:
            DataError: it is something else.
        """
        match given:
            case str():
                first, second = given, None
            case (str() as first, str() as second):
                pass
            case _:
                raise DataError(f"it is no text but {type(given).__name__}", "Give strings, or pairs of them")
        # A lone surrogate can't be encoded as UTF-8, which the tokenizer works in.
        clean = (part and part.encode("utf-8", "replace").decode("utf-8") for part in (first, second))
        return dict(zip(("text", "text_pair"), clean, strict=True))

    @staticmethod
    def ready(row: dict[str, Any]) -> dict[str, Any]:
        """A row of plain text as the task reads it."""
        return row

    def tokenize(self, rows: Sequence[Row]) -> list[Arrays]:
        """One dict of int64 arrays [T] a row, T ≤ max_length; keys are the graph's inputs."""
        return [self._arrays(encoding) for encoding in self._encodings(rows)]

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Pad to the longest: a dict of int64 arrays [B, T]."""
        longest = max(len(next(iter(arrays.values()))) for arrays in encoded)
        fill = {"input_ids": self.config.pad_id, "token_type_ids": self.config.pad_type_id}
        batch = {}
        for name in self.config.inputs:
            padded = np.full((len(encoded), longest), fill.get(name, 0), dtype=np.int64)
            for i, arrays in enumerate(encoded):
                n = len(arrays[name])
                start = 0 if self.config.padding_side == "right" else longest - n
                padded[i, start : start + n] = arrays[name]
            batch[name] = padded
        return batch

    def encode(self, rows: Sequence[Row]) -> Arrays:
        """The graph's inputs for a batch of rows: int64 arrays [B, T]."""
        encoded = self.tokenize(rows)
        if len(encoded) == 1:  # nothing to pad; a single text is what latency is measured by
            return {name: array[None] for name, array in encoded[0].items()}
        return self.collate(encoded)

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        """Tokens of each encoded row, which batches are sorted by."""
        return [len(arrays[self.config.inputs[0]]) for arrays in encoded]

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """What is worth saying of how these rows are read."""
        limit = self.config.max_length
        share = sum(size >= limit for size in self.sizes(self.tokenize(rows))) / len(rows)
        if share <= 0.25:
            return []
        return [
            f"{share:.0%} of the texts are longer than {limit} tokens and are cut there; "
            "--max-length reads more, and takes longer"
        ]

    def graph_inputs(self, arrays: Arrays) -> Arrays:
        """What the graph reads of an encoded batch."""
        return arrays

    def pick(self, output: Array, arrays: Arrays) -> Array:
        """The graph's output for an encoded batch → logits [B, *answer_shape]."""
        return output

    def cost(self, row: Row) -> int:
        """About how many tokens a row takes, in 1 … max_length, from its characters alone: for queues and limits."""
        limit = self.config.max_length
        text = row["text"] + row["text_pair"] if row.get("text_pair") else row["text"]
        if len(text) > limit * _CHARS_PER_TOKEN:
            return limit
        tokens = 2 + len(text) / _ASCII_PER_TOKEN
        if not text.isascii():  # other scripts take more tokens a character, and more bytes
            tokens += (len(text.encode("utf-8", "replace")) - len(text)) / _BYTES_PER_FOREIGN_TOKEN
        return max(1, min(limit, round(tokens)))

    def is_cut(self, row: Row) -> bool:
        """Whether a row has more tokens than are read."""
        pair = row.get("text_pair")
        encoding = self._tokenizer.encode(row["text"]) if not pair else self._tokenizer.encode(row["text"], pair)
        return bool(encoding.overflowing)

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self._tokenizer.get_vocab_size())

    def lengths(self) -> list[int]:
        """Lengths in tokens at which speed is worth knowing: doubling from 8, up to what is read."""
        limit = self.config.max_length
        return [n for n in (8, 16, 32, 64, 128, 256, 512) if n < limit] + [limit]

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """The graph's inputs [1, length] from real texts, joined until they are long enough, and cut."""
        text = ""
        for row in rows:
            text = f"{text} {row['text']}"
            if len(text) > length * _CHARS_PER_TOKEN:
                break
        arrays = self.encode([{"text": text}])
        return {name: np.resize(array, (1, length)) for name, array in arrays.items()}

    def axes(self) -> dict[str, dict[int, str]]:
        """Names of the dynamic axes of every input and of the output."""
        inputs = {name: {0: "batch_size", 1: "sequence_length"} for name in self.config.inputs}
        return inputs | {self.output: {0: "batch_size"}}

    def probes(self) -> list[dict[str, Any]]:
        """Rows at the edges of what may come in: nothing, one letter, too long, no letters at all."""
        texts = (
            "",
            "a",
            "word " * 4 * self.config.max_length,
            "x" * 300,
            "\U0001f600 \u4f60\u597d \u200b",
            "\n\t ",
        )
        return [{"text": text} for text in texts]

    def examples(self) -> list[dict[str, Any]]:
        """Rows as they come in every day."""
        texts = (
            "The parcel arrived two days late and the box was torn, but nothing inside was broken.",
            "Can you tell me how much money is left in my account?",
            "Shares in the airline rose after it beat profit forecasts for the third quarter in a row.",
            "play something quiet in the kitchen",
        )
        return [{"text": text} for text in texts]

    # --- inside

    def _encodings(self, rows: Sequence[Row]) -> list[Encoding]:
        if any(row.get("text_pair") for row in rows):
            pairs = [(row["text"], row["text_pair"]) if row.get("text_pair") else row["text"] for row in rows]
            return list(self._tokenizer.encode_batch_fast(pairs))
        texts = [row["text"] for row in rows]
        heads = [self._head(text) for text in texts]
        encodings = list(self._tokenizer.encode_batch_fast(heads))
        for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
            if len(head) < len(text) and len(encodings[i].ids) < self.config.max_length:
                encodings[i] = self._tokenizer.encode(text)  # the head was too short: few, long words
        return encodings

    def _head(self, text: str) -> str:
        """The part of a long text that its first `max_length` tokens come from.

        Tokenizers split on white space before all else, so a head that is cut there, and that gives
        `max_length` tokens or more, gives the same ones as the whole text. It saves most of the time on long
        texts; `_encodings` falls back to the whole text when the head gives fewer.
        """
        limit = self.config.max_length * _CHARS_PER_TOKEN
        if len(text) <= limit:
            return text
        cut = text.rfind(" ", 0, limit)
        return text[:cut] if cut > 0 else text

    def _arrays(self, encoding: Encoding) -> Arrays:
        try:
            return {name: np.array(getattr(encoding, _GIVEN[name]), dtype=np.int64) for name in self.config.inputs}
        except KeyError as error:
            raise ModelError(f"the model wants an input {error} that no tokenizer gives") from None
