"""Token classification: a tag for each word of a text, such as named entities (BIO).

A row's `text` is its words joined by single spaces, its `label` their tags, joined likewise. Logits are those of each
word's first token, [N, max_length, C]: so models with different tokenizers are comparable word by word. Predictions end
with the last word within the model's max_length; metrics count later entities as missed.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
from tokenizers import Encoding

from kdexport.errors import DataError
from kdexport.tasks.base import PREDICT, Card, Objective
from kdexport.tasks.config import NO_LABEL, Arrays, Items, Row
from kdexport.tasks.inputs.texts import Texts, padded
from kdexport.tasks.menus import TEXTS
from kdexport.tasks.metrics import Array, Metric, f1_of, softmax

OUTSIDE = "O"
# Marks a word that the model did not read: the logit of O is this, the others are exactly 0.
_UNREAD = 10.0
# The place of a truncated word; −1 is padding.
_CUT_OFF = -2
# Letters and digits, with apostrophes, dots or hyphens between them; any other character by itself.
_WORD = re.compile(r"\w+(?:[.’'-]\w+)*|[^\w\s]")


class Entity(NamedTuple):
    """Words `start` up to, but not including, `end` are an entity of this kind."""

    kind: str
    start: int
    end: int


class TaggedText(msgspec.Struct, frozen=True):
    """The prediction for one row: each word's tag and its probability."""

    words: list[str]
    tags: list[str]
    scores: list[float]

    @property
    def entities(self) -> list[dict[str, Any]]:
        """The entities: kind, mean score of the words, and the words."""
        return [
            {
                "entity_group": kind,
                "score": sum(self.scores[start:end]) / (end - start),
                "word": " ".join(self.words[start:end]),
                "start": start,
                "end": end,
            }
            for kind, start, end in entities(self.tags)
        ]

    def to_dict(self, scores: bool) -> dict[str, Any]:
        rounded = [{**entity, "score": round(entity["score"], 6)} for entity in self.entities]
        found: dict[str, Any] = {"entities": rounded, "words": self.words, "tags": self.tags}
        return found | {"scores": [round(score, 6) for score in self.scores]} if scores else found


def entities(tags: Sequence[str]) -> list[Entity]:
    """Extract the entities of a tag sequence, as conlleval and seqeval do: a stray I- begins one as well."""
    found: list[Entity] = []
    kind, start = "", 0
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, _, of = tag.partition("-")
        if kind and (mark != "I" or of != kind):
            found.append(Entity(kind, start, i))
            kind = ""
        if mark in ("B", "I") and not kind:
            kind, start = of, i
    return found


def words_in(text: str, most: int | None = None) -> list[str]:
    """Split a text into words, or its first `most`; punctuation marks are words of their own."""
    return [found[0] for found in islice(_WORD.finditer(text), most)]


class TokenClassification(Texts):
    """Rows `{"text": "Ada lives in York", "label": "B-person O O B-location"}` → logits [N, max_length, C] → tags."""

    name: ClassVar = "token-classification"
    metric: ClassVar = Metric("entity F1")
    objective: ClassVar[Objective] = "tokens"
    menu: ClassVar = TEXTS._replace(vocabulary="whole")
    card: ClassVar = Card(
        "token-classification", "ORTModelForTokenClassification", PREDICT.format("a text to classify")
    )
    auto_class: ClassVar = "AutoModelForTokenClassification"
    heads: ClassVar = ("ForTokenClassification",)
    stands_for: ClassVar = ("bert", "BertForTokenClassification")
    has_words: ClassVar = True
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("tokens", "words", "text"),
        "label": ("tags", "ner_tags", "labels", "label"),
    }

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        """Lists of words and tags become texts; a text without tags is split into words."""
        words, tags = row.get("text"), row.get("label")
        if isinstance(words, str) and tags is None:
            words = words_in(words)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return "its words are no list of texts"
        if strange := [word for word in words if not word or re.search(r"\s", word)]:
            return f"the word {strange[0]!r} is empty or has a space in it"
        if tags is not None:
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                return "its tags are no list of texts"
            if len(tags) != len(words):
                return f"it has {len(words)} words and {len(tags)} tags"
        return row | {"text": " ".join(words), "label": None if tags is None else " ".join(tags)}

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        if problem := Texts.check(row, max_chars, needs_label):
            return problem
        before = OUTSIDE
        for i, tag in enumerate((row.get("label") or "").split()):
            mark, dash, kind = tag.partition("-")
            if tag != OUTSIDE and not (mark in ("B", "I") and dash and kind):
                return f"tag {tag!r} of word {i + 1} is none of O, B-… and I-…"
            if mark == "I" and before not in (f"B-{kind}", f"I-{kind}"):
                return f"tag {tag!r} of word {i + 1} follows {before!r}, so it is no valid BIO"
            before = tag
        return None

    def row(self, given: object) -> dict[str, Any]:
        if not isinstance(given, list):
            return self.ready(super().row(given))
        row = TokenClassification.canonical({"text": given})
        if isinstance(row, str):
            raise DataError(row)
        return row

    def ready(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {"text": " ".join(words_in(row["text"], self.config.max_length))}

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return set((row["label"] or "").split())

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """O first, then alphabetically."""
        return [OUTSIDE, *sorted(set(labels) - {OUTSIDE})]

    @staticmethod
    def stratum(row: Row) -> str:
        """The kinds of entities in a row."""
        return " ".join(sorted({tag[2:] for tag in (row["label"] or "").split()} - {""}))

    @property
    def answer_shape(self) -> tuple[int, ...]:
        return self.config.max_length, len(self.labels)

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Add `places` [B, W], padded with −1."""
        batch = super().collate(encoded)
        if "places" not in encoded[0]:  # encoded elsewhere: each token is a word
            encoded = [{"places": np.arange(len(arrays["input_ids"]))} for arrays in encoded]
        places = [arrays["places"] for arrays in encoded]
        return batch | {"places": padded(places, max(map(len, places)), -1)}

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """[B, T, C] by token → [B, max_length, C] by word; zeros after a row's words."""
        places = arrays["places"]
        logits = np.zeros((len(output), *self.answer_shape), dtype=np.float32)
        read = logits[:, : places.shape[1]]
        read[places >= 0] = output[np.nonzero(places >= 0)[0], places[places >= 0]]
        unread = (places == _CUT_OFF).nonzero()
        read[(*unread, np.zeros_like(unread[0]))] = _UNREAD
        return logits

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """Each token is a word."""
        return super().sized(rows, length) | {"places": np.arange(length)[None]}

    def axes(self) -> dict[str, dict[int, str]]:
        return {name: {0: "batch_size", 1: "sequence_length"} for name in (*self.config.inputs, self.output)}

    def scores(self, logits: Array, function: str | None = None) -> Array:
        return softmax(logits.astype(np.float64))

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """The lowest of the words' scores; 1 where no word is read."""
        return np.array([min(answer.scores, default=1.0) for answer in self.decode(logits, rows)])

    def decode(self, logits: Array, rows: Sequence[Row]) -> list[TaggedText]:
        """The words that the model reads, each with its most probable tag."""
        found = []
        for row, of_row, n in zip(rows, logits, self.words_read(logits), strict=True):
            words = row["text"].split(" ", n)[:n]
            tags = [self.labels[i] for i in of_row[: len(words)].argmax(axis=-1)]
            found.append(TaggedText(words, tags, self.scores(of_row[: len(words)]).max(axis=-1).tolist()))
        return found

    @staticmethod
    def words_read(logits: Array) -> Array:
        """Count the words up to the last one that the model reads, from logits [N, max_length, C]: int64 [N]."""
        read = logits.any(axis=-1) & ((logits[..., 0] != _UNREAD) | logits[..., 1:].any(axis=-1))
        return np.asarray((read * np.arange(1, read.shape[1] + 1)).max(axis=1))

    def agrees(self, logits: Array, reference: Array) -> Array:
        """bool [N]: all words have the same tags in both."""
        return np.asarray((logits.argmax(axis=-1) == reference.argmax(axis=-1)).all(axis=1))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """int64 [N, max_length]; −100, the index that losses ignore, where there is no tag."""
        index, most = {label: i for i, label in enumerate(self.labels)}, self.config.max_length
        tags = [(row.get("label") or "").split()[:most] for row in rows]
        return padded([[index[tag] for tag in of_row] for of_row in tags], most, NO_LABEL)

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array:
        """bool [N]: all words have the correct tag."""
        targets = self.label_array(rows)
        return np.asarray(((logits.argmax(axis=-1) == targets) | (targets == NO_LABEL)).all(axis=1))

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Correct, predicted and actual entities: float64 [N, 3]."""
        counts = np.zeros((len(rows), 3))
        for i, (row, answer) in enumerate(zip(rows, self.decode(logits, rows), strict=True)):
            ours, theirs = set(entities(answer.tags)), set(entities(row["label"].split()))
            counts[i] = len(ours & theirs), len(ours), len(theirs)
        return counts

    def value(self, sums: Array) -> Array:
        """Entity F1; 1 where no entity is predicted or actual."""
        return f1_of(sums)

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Precision and recall of entities."""
        right, found, there = self.stats(logits, rows).sum(axis=0)
        return {"precision": float(right / max(found, 1)), "recall": float(right / max(there, 1))}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        """Each labelled word."""
        targets = self.label_array(rows)
        of, word = (targets != NO_LABEL).nonzero()
        texts = [row["text"].split(" ", self.config.max_length) for row in rows]
        return Items(of, targets[of, word], logits[of, word], [texts[i][j] for i, j in zip(of, word, strict=True)])

    def _split(self, texts: list[str], offsets: bool) -> list[Encoding]:
        # A model reads at least one token: an empty text becomes a full stop, which has no tag.
        words = [(text or ".").split(" ") for text in texts]
        return list(self._tokenizer.encode_batch(words, is_pretokenized=True, add_special_tokens=False))

    def tokenize(self, rows: Sequence[Row]) -> list[Arrays]:
        """Add `places` [W]: the index of each word's first token."""
        encoded = []
        for row, encoding in zip(rows, self._encodings(rows), strict=True):
            words = min(row["text"].count(" ") + 1, self.config.max_length) if row["text"] else 0
            places = np.full(words, _CUT_OFF, dtype=np.int64)
            for token in range(len(encoding.ids) - 1, -1, -1):
                if (word := encoding.word_ids[token]) is not None and word < len(places):
                    places[word] = token
            encoded.append(self._arrays(encoding) | {"places": places})
        return encoded
