"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from tokenizers import Encoding, Tokenizer

from kdexport.errors import ArtifactError, ModelError
from kdexport.tasks.metrics import Array, sigmoid, softmax

Row = Mapping[str, Any]
Arrays = dict[str, Array]
Function = Literal["softmax", "sigmoid", "none"]

# Where a text is cut before it is tokenised, in characters per token that is kept. English has about 5.
_CHARS_PER_TOKEN = 6
# What a token takes of a text, for estimates: of clinc150's and BBC's texts 99.7 % are within 40 % of the truth.
_ASCII_PER_TOKEN, _BYTES_PER_FOREIGN_TOKEN = 4.7, 2.5
# The index that PyTorch's cross-entropy passes over.
_NO_LABEL = -100


class TaskConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`task.json`, and the manifest's `task`: all that encode and decode need besides tokenizer.json."""

    task: str
    labels: list[str]
    inputs: list[str]
    max_length: int
    pad_id: int = 0
    pad_type_id: int = 0
    padding_side: str = "right"
    function: Function = "softmax"


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {"softmax": softmax, "sigmoid": sigmoid, "none": np.asarray}


def function_of(labels: int, problem_type: str | None) -> Function:
    """The function from logits to scores that transformers' pipeline takes for a model of so many labels.

    As in transformers 4.57, `TextClassificationPipeline.postprocess`: regression is asked first, and one label
    means sigmoid even where the problem type says single-label.
    """
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or labels == 1 else "softmax"


# Input of a graph → attribute of an encoding.
_GIVEN = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class Prediction(msgspec.Struct, frozen=True):
    """The answer for one row: the best label and its score; `values` are the scores of all `labels`, in order."""

    label: str
    score: float
    values: list[float]
    labels: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """Label → score. Made when asked for: of 150 labels it takes as long as a small model's layer."""
        return dict(zip(self.labels, self.values, strict=True))

    def __repr__(self) -> str:
        return f"Prediction(label={self.label!r}, score={self.score:.4f})"


class TextClassification:
    """Rows `{"text": …, "text_pair": …, "label": …}` → input ids → logits [N, C] → one label each."""

    name: ClassVar = "text-classification"
    metric_name: ClassVar = "accuracy"
    columns: ClassVar = ("text", "text_pair", "label")
    output: ClassVar = "logits"

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.labels = config.labels
        self._index = {label: i for i, label in enumerate(config.labels)}
        self._tokenizer = tokenizer
        # A tokenizer.json may come with padding and truncation of its own; ours are stated in the config.
        tokenizer.no_padding()
        tokenizer.enable_truncation(config.max_length)

    @classmethod
    def load(cls, folder: Path) -> TextClassification:
        """Open the task of a model folder (`task.json`) or an artifact (`kdexport.json`).

        Raises:
            ArtifactError: a file is missing or unreadable.
        """
        try:
            if (folder / "kdexport.json").exists():
                manifest = msgspec.json.decode((folder / "kdexport.json").read_bytes())
                config = msgspec.convert(manifest["task"], TaskConfig)
            else:
                config = msgspec.json.decode((folder / "task.json").read_bytes(), type=TaskConfig)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (OSError, msgspec.MsgspecError, KeyError) as error:
            raise ArtifactError(f"{folder} holds no task of ours: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{folder}/tokenizer.json can't be read: {error}") from None
        return cls(config, tokenizer)

    # --- rows → arrays

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

    # --- logits → answers

    def scores(self, logits: Array, function: str | None = None) -> Array:
        """Logits [N, C] → scores float64 [N, C].

        Args:
            logits: of N rows.
            function: softmax (of a row, they sum to 1), sigmoid (each by itself) or none (the logits); the
                model's own when None.
        """
        return _FUNCTIONS[function or self.config.function](logits.astype(np.float64))

    def decode(self, logits: Array) -> list[Prediction]:
        """Logits [N, C] → the label with the highest score of each row, with the scores of all."""
        best, scores = logits.argmax(axis=1).tolist(), self.scores(logits).tolist()
        rows = zip(best, scores, strict=True)
        return [Prediction(self.labels[i], values[i], values, self.labels) for i, values in rows]

    def agrees(self, logits: Array, reference: Array) -> Array:
        """Whether each row has the same answer in both: bool [N].

        The same answer is the same label (softmax), the same labels above one half (sigmoid), or numbers that are
        no further apart than a tenth of the reference's own spread over the rows (none).
        """
        match self.config.function:
            case "softmax":
                return np.asarray(logits.argmax(axis=1) == reference.argmax(axis=1))
            case "sigmoid":
                return np.asarray(((logits > 0) == (reference > 0)).all(axis=1))
            case "none":
                return np.asarray((np.abs(logits - reference) <= 0.1 * reference.std(axis=0)).all(axis=1))

    def targets(self, rows: Iterable[Row]) -> Array:
        """The rows' labels as indices int64 [N]; −100, which losses pass over, for a row without one."""
        return np.array([self._place(row["label"]) for row in rows], dtype=np.int64)

    def hits(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Whether each row, all of them labelled, is answered rightly: bool [N]; its mean is the metric, accuracy."""
        return np.asarray(logits.argmax(axis=-1) == self.targets(rows))

    # --- inside

    def _place(self, label: str | None) -> int:
        if label is None:
            return _NO_LABEL
        # A label that is a number and no name is a place in the model's order.
        return self._index[label] if label in self._index else int(label)

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
