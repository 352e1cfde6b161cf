"""Text input: texts and pairs of texts → token ids → the arrays of a graph."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from kdexport.errors import ArtifactError, DataError
from kdexport.tasks.base import Modality, Task
from kdexport.tasks.config import Arrays, Row, TaskConfig, read_config
from kdexport.tasks.inputs.ragged import MANY, Ragged
from kdexport.tasks.metrics import Array

# Characters per token for cutting a text before tokenisation. English has about 5.
CHARS_PER_TOKEN = 6
# All tokenizers split at a single space between letters or digits; the search for one covers this many characters.
_BREAK, _BREAK_WITHIN = re.compile(r"\w (?=\w)"), 256
# Spare tokens after the last one used, where a text is cut within a word: a word has fewer tokens.
SPARE = 128
# The length in characters up to which a pair's sides are compared by tokens.
_COUNTED = 10_000
# Rows tokenised together: enough for all cores, with bounded memory.
_AT_ONCE = 256
# With more characters per word, the first `max_length` tokens of a text may be far apart.
_CHARS_PER_WORD = 9
# For estimates of tokens: for 99.7 % of clinc150's and BBC's texts they are within 40 % of the truth.
_ASCII_PER_TOKEN, _BYTES_PER_FOREIGN_TOKEN = 4.7, 2.5
# Input of a graph → attribute of an encoding.
_GIVEN = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class Texts(Task):
    """The input side of tasks with rows `{"text": …, "text_pair": …}`."""

    modality: ClassVar[Modality] = "text"

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self.config, self.labels, self._tokenizer = config, config.labels, tokenizer
        # Override padding and truncation in tokenizer.json: the config decides.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Only truncates and adds special tokens, which a tokenizer can't do to a part of a text.
        self._finisher = Tokenizer(BPE())
        self._finisher.post_processor = tokenizer.post_processor or TemplateProcessing(pair="$A $B:1")
        self._finisher.enable_truncation(config.max_length, direction=config.truncation_side)
        self._short = config.max_length * CHARS_PER_TOKEN

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = read_config(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{folder}/tokenizer.json can't be read: {error}") from None
        return cls(config, tokenizer)

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        columns = ("text",) if row.get("text_pair") is None else ("text", "text_pair")
        for column in columns:
            value = row.get(column)
            if not isinstance(value, str):
                return f"{column} is {'missing' if value is None else f'no text but {type(value).__name__}'}"
            if not value.strip():
                return f"{column} is empty"
            if len(value) > max_chars:
                return f"{column} has {len(value):,} characters (a quote left open?)"
        return "label is empty" if needs_label and row.get("label") in (None, "") else None

    @staticmethod
    def content(row: Row) -> str:
        return "\x1f".join(filter(None, (row["text"], row.get("text_pair"))))

    @staticmethod
    def title(row: Row) -> str:
        return " ‖ ".join(filter(None, (row["text"], row.get("text_pair"))))

    def row(self, given: object) -> dict[str, Any]:
        match given:
            case str():
                first, second = given, None
            case (str() as first, str() as second):
                pass
            case _:
                raise DataError(f"it is no text but {type(given).__name__}", "Give strings, or pairs of them")
        # The tokenizer works in UTF-8, which can't encode a lone surrogate.
        clean = (part and part.encode("utf-8", "replace").decode("utf-8") for part in (first, second))
        return dict(zip(("text", "text_pair"), clean, strict=True))

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        """int64 [T], T ≤ max_length."""
        found = self._tokenized(rows)
        return Ragged(found) if len(rows) > MANY else list(found)

    def _tokenized(self, rows: Sequence[Row]) -> Iterator[Arrays]:
        return (self._arrays(encoding) for encoding in self._encodings(rows))

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        longest = max(len(next(iter(arrays.values()))) for arrays in encoded)
        fill = {"input_ids": self.config.pad_id, "token_type_ids": self.config.pad_type_id}
        return {
            name: padded([arrays[name] for arrays in encoded], longest, fill.get(name, 0), self.config.padding_side)
            for name in self.config.inputs
        }

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        if isinstance(encoded, Ragged):
            return encoded.sizes(self.config.inputs[0])
        return [len(arrays[self.config.inputs[0]]) for arrays in encoded]

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        limit, encoded, found = self.config.max_length, self.tokenize(rows), []
        sizes = self.sizes(encoded)
        if (fraction := sum(size >= limit for size in sizes) / len(rows)) > 0.25:
            cut = f"{fraction:.0%} of the texts are longer than {limit} tokens and are cut there"
            found.append(f"{cut}; --max-length reads more, and takes longer")
        tokens = sum(sizes) - len(rows) * self._finisher.num_special_tokens_to_add(False)
        id_of_unknown = self._unknown()
        unknown = sum(np.count_nonzero(arrays["input_ids"] == id_of_unknown) for arrays in encoded)
        if unknown > 0.2 * tokens:
            what = f"{unknown / tokens:.0%} of the texts' tokens are unknown to its vocabulary"
            found.append(f"{what}. Take a teacher of their language, or a multilingual one")
        return found

    def _unknown(self) -> int:
        """Return the id of the token for what the vocabulary lacks; −1 if there is none."""
        model = msgspec.json.decode(self._tokenizer.to_str())["model"]
        unknown = model.get("unk_id", self._tokenizer.token_to_id(model.get("unk_token") or ""))
        return -1 if unknown is None else int(unknown)

    def cost(self, row: Row) -> int:
        """Estimate a row's tokens from its characters alone, for queues and limits.

        At most max_length, plus the extra tokenisation that a long text of few words may take.
        """
        limit = self.config.max_length
        text = row["text"] + row["text_pair"] if row.get("text_pair") else row["text"]
        if len(text) > limit * CHARS_PER_TOKEN:
            some, _ = _part_of(text, limit * _CHARS_PER_WORD, self.config.truncation_side)
            if len(some) == len(text) or len(some.split()) >= limit:
                return limit
            return limit + min(len(text), _COUNTED) // _CHARS_PER_WORD
        tokens = 2 + len(text) / _ASCII_PER_TOKEN
        if not text.isascii():  # other scripts take more tokens a character, and more bytes
            tokens += (len(text.encode("utf-8", "replace")) - len(text)) / _BYTES_PER_FOREIGN_TOKEN
        return max(1, min(limit, round(tokens)))

    def is_cut(self, row: Row) -> bool:
        """Return whether a row has more tokens than the model reads."""
        return bool(next(self._encodings([row])).overflowing)

    def of_ids(self, ids: Sequence[int]) -> Arrays:
        """Return the arrays of a text's tokens as the tokenizer gives them, special ones included.

        Raises:
            DataError: there are none, more than the model reads, or one that its vocabulary lacks.
        """
        if not 1 <= len(ids) <= self.config.max_length:
            raise DataError(f"a text has {len(ids):,} token ids", f"Give 1 to {self.config.max_length}")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise DataError(
                "a token id is not in the model's vocabulary", f"Give those from 0 to {self.vocabulary - 1}"
            )
        given = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return {name: np.array(given.get(name, [0] * len(ids)), dtype=np.int64) for name in self.config.inputs}

    @property
    def vocabulary(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def lengths(self) -> list[int]:
        """Lengths in tokens: powers of two from 8, up to max_length."""
        limit = self.config.max_length
        return [n for n in (8, 16, 32, 64, 128, 256, 512) if n < limit] + [limit]

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """From real texts, concatenated and cut; the last token stays, which BART reads."""
        text = ""
        for row in rows:
            text = f"{text} {row['text']}"
            if len(text) > length * CHARS_PER_TOKEN:
                break
        arrays = self.encode([{"text": text}])
        return {name: np.append(np.resize(array, (1, length - 1)), array[:, -1:], 1) for name, array in arrays.items()}

    def axes(self) -> dict[str, dict[int, str]]:
        inputs = {name: {0: "batch_size", 1: "sequence_length"} for name in self.config.inputs}
        return inputs | {self.output: {0: "batch_size"}}

    def probes(self) -> list[dict[str, Any]]:
        """Empty, one letter, too long, no letters."""
        long, foreign = "word " * 4 * self.config.max_length, "\U0001f600 \u4f60\u597d \u200b"
        return [self.ready({"text": text}) for text in ("", "a", long, "x" * 300, foreign, "\n\t ")]

    def examples(self) -> list[dict[str, Any]]:
        texts = (
            "The parcel arrived two days late and the box was torn, but nothing inside was broken.",
            "Can you tell me how much money is left in my account?",
            "Shares in the airline rose after it beat profit forecasts for the third quarter in a row.",
            "play something quiet in the kitchen",
        )
        return [self.ready({"text": text}) for text in texts]

    def _encodings(self, rows: Sequence[Row], offsets: bool = False) -> Iterator[Encoding]:
        """Encode rows as the tokenizer does with truncation to `max_length`, but tokenise no more than necessary.

        The sides of a pair are encoded separately: the tokenizer's own truncation stores every combination of
        overflowing parts, which is gigabytes for two texts of 10,000 characters.
        """
        if len(rows) == 1 and not rows[0].get("text_pair") and len(rows[0]["text"]) <= self._short:
            yield self._finisher.post_process(self._split([rows[0]["text"]], offsets)[0])
            return
        for start in range(0, len(rows), _AT_ONCE):
            some = list(rows[start : start + _AT_ONCE])
            paired = [row for row in some if row.get("text_pair")]
            sides = self._heads([row["text"] for row in some] + [row["text_pair"] for row in paired], offsets)
            others = iter(sides[len(some) :])
            for row, side in zip(some, sides, strict=False):
                pair = row.get("text_pair")
                yield self._joined(row, side, next(others)) if pair else self._finisher.post_process(side)

    def _heads(self, texts: Sequence[str], offsets: bool) -> list[Encoding]:
        """Tokenise the parts of texts that are read, long enough for `max_length` tokens, without special tokens.

        A part, the beginning or the end of a text, is doubled if it is too short. The tokens equal those of the whole
        text, except within a word (as the tokenizer splits words) of more than 128 tokens.
        """
        limit, side = self.config.max_length, self.config.truncation_side
        parts = [_part_of(text, limit * CHARS_PER_TOKEN, side) for text in texts]
        found = self._split([part for part, _ in parts], offsets)
        for i, text in enumerate(texts):
            part, spare = parts[i]
            while len(part) < len(text) and len(found[i]) < limit + 2 + spare:
                part, spare = _part_of(text, 2 * len(part), side)
                (found[i],) = self._split([part], offsets)
        return found

    def _split(self, texts: list[str], offsets: bool) -> list[Encoding]:
        """Encode whole texts without special tokens; it is faster without `offsets`."""
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        return list(encode(texts, add_special_tokens=False))

    def _joined(self, row: Row, first: Encoding, second: Encoding) -> Encoding:
        """Truncate a pair to `max_length` tokens, special ones included; two long sides get about the same number.

        The longer side gets an odd token: above 10,000 characters the one of more characters, so that no long text is
        tokenised completely for one token.
        """
        limit, texts = self.config.max_length, (row["text"], row["text_pair"])
        sizes = [len(first), len(second)]
        if min(sizes) > limit and (limit - self._finisher.num_special_tokens_to_add(True)) % 2:
            few = max(map(len, texts)) <= _COUNTED
            sizes = [len(side) for text in texts for side in self._split([text], False)] if few else [*map(len, texts)]
        # Leave little overflow to the tokenizer's truncation.
        side = self.config.truncation_side
        first.truncate(limit + 1 + (sizes[0] > sizes[1]), direction=side)
        second.truncate(limit + 1 + (sizes[1] > sizes[0]), direction=side)
        return self._finisher.post_process(first, second)

    def _arrays(self, encoding: Encoding) -> Arrays:
        if not encoding.ids:  # an empty text, where no special tokens are added
            config = self.config
            nothing = {"input_ids": config.pad_id if config.end_id is None else config.end_id, "attention_mask": 1}
            return {name: np.array([nothing.get(name, 0)], dtype=np.int64) for name in config.inputs}
        return {name: np.array(getattr(encoding, _GIVEN[name]), dtype=np.int64) for name in self.config.inputs}


def padded(rows: Sequence[Sequence[int] | Array], length: int, fill: int, side: str = "right") -> Array:
    """Return rows of any lengths as int64 [N, length], filled up on one side."""
    found = np.full((len(rows), length), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else length - len(row)
        found[i, start : start + len(row)] = row
    return found


def _part_of(text: str, size: int, truncation_side: str) -> tuple[str, int]:
    """Return at least `size` characters of a text's beginning or end, and how many spare tokens they must have."""
    if size >= len(text):
        return text, 0
    if truncation_side == "right":
        found = _BREAK.search(text, size, size + _BREAK_WITHIN)
        return (text[: found.start() + 1], 0) if found else (text[:size], SPARE)
    begin = len(text) - size
    breaks = [found.start() + 1 for found in _BREAK.finditer(text, max(0, begin - _BREAK_WITHIN), begin)]
    return (text[breaks[-1] :], 0) if breaks else (text[begin:], SPARE)
