"""Token classification: a tag for each word of a text: named entities (BIO), or plain ones such as parts of speech.

Tags in other schemes are converted to BIO when data are read; a model may have labels of any (`tasks.tags`). Whether
tags are plain is decided by the labels, so a model's configuration needs no more.

A row's `text` is its words joined by single spaces, its `label` their tags, joined likewise. Logits are those of each
word's first token, [N, max_length, C]: so models with different tokenizers are comparable word by word. Predictions end
with the last word within the model's max_length; metrics count later entities as missed.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from operator import eq
from typing import Any, ClassVar

import msgspec
import numpy as np
from tokenizers import Encoding

from kdexport.errors import DataError
from kdexport.tasks.base import Objective, Task
from kdexport.tasks.card import PREDICT, Card
from kdexport.tasks.config import NO_LABEL, Arrays, Items, Row, TaskConfig
from kdexport.tasks.inputs.texts import Texts, padded
from kdexport.tasks.inputs.words import words_in
from kdexport.tasks.menus import TEXTS
from kdexport.tasks.metrics import Array, Metric, f1_of, softmax
from kdexport.tasks.tags import OUTSIDE, Entity, are_plain, bio, entities, misfit, own_names, scheme_of, spelled

# Marks a word that the model did not read: the logit of O (of plain tags, the first) is this, the others exactly 0.
_UNREAD = 10.0
# The place of a truncated word; −1 is padding.
_CUT_OFF = -2


class TaggedText(msgspec.Struct, frozen=True):
    """The prediction for one row: each word's tag and its probability."""

    words: list[str]
    tags: list[str]
    scores: list[float]
    plain: bool = False

    @property
    def entities(self) -> list[dict[str, Any]]:
        """The entities: kind, mean score of the words, and the words; where tags are plain, each word."""
        every = [Entity(tag, i, i + 1) for i, tag in enumerate(self.tags)] if self.plain else entities(self.tags)
        return [
            {
                "entity_group": kind,
                "score": sum(self.scores[start:end]) / (end - start),
                "word": " ".join(self.words[start:end]),
                "start": start,
                "end": end,
            }
            for kind, start, end in every
        ]

    def to_dict(self, scores: bool) -> dict[str, Any]:
        rounded = [{**entity, "score": round(entity["score"], 6)} for entity in self.entities]
        found: dict[str, Any] = {} if self.plain else {"entities": rounded}
        found |= {"words": self.words, "tags": self.tags}
        return found | {"scores": [round(score, 6) for score in self.scores]} if scores else found


class TokenClassification(Texts):
    """Rows `{"text": "Ada lives in York", "label": "B-person O O B-location"}` → logits [N, max_length, C] → tags."""

    name: ClassVar = "token-classification"
    metric: ClassVar = Metric("entity F1")
    objective: ClassVar[Objective] = "tokens"
    # Two narrow layers kept 55 % of the teacher's entity F1 on WNUT 17 (docs/decisions.md).
    menu: ClassVar = TEXTS._replace(default="spread:3", vocabulary="whole")
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

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        return "the rows are lists of words" if all(isinstance(row["text"], list) for row in rows) else ""

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        """Lists of words and tags become texts; a text without tags is split into words."""
        words, tags = row.get("text"), row.get("label")
        if isinstance(words, str) and tags is None:
            words = words_in(words)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return "its words are no list of texts"
        if strange := [word for word in words if not word or " " in word]:
            return f"the word {strange[0][:40]!r} is empty or has a space in it"
        if tags is not None:
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                return "its tags are no list of texts"
            if len(tags) != len(words):
                return f"it has {len(words)} words and {len(tags)} tags"
            if strange := [tag for tag in tags if not tag or re.search(r"\s", tag)]:
                return f"the tag {strange[0][:40]!r} is empty or has a space in it"
        return row | {"text": " ".join(words), "label": None if tags is None else " ".join(tags)}

    @classmethod
    def unified(cls, rows: Sequence[Row]) -> tuple[Iterable[Row | str], str]:
        """Tags as BIO, unless they are plain."""

        def every() -> Iterator[list[str]]:
            return ((row["label"] or "").split() for row in rows)

        labels = {tag for tags in every() for tag in tags}
        strange, plain = misfit(labels), are_plain(labels)

        def converted(row: Row, tags: list[str]) -> Row | str:
            if wrong := [i for i, tag in enumerate(tags) if tag in strange]:
                return f"tag {tags[wrong[0]]!r} of word {wrong[0] + 1} is none of O, B-… and I-…"
            return {**row, "label": " ".join(bio(tags))} if tags and not plain else row

        remark = scheme_of(lambda: (tags for tags in every() if not strange & {*tags}))
        return (converted(row, tags) for row, tags in zip(rows, every(), strict=True)), remark

    def row(self, given: object) -> dict[str, Any]:
        return self.ready({"text": given} if isinstance(given, list) else super().row(given))

    def ready(self, row: dict[str, Any]) -> dict[str, Any]:
        """`text` is a text, or a list of words."""
        given, most = row["text"], self.config.max_length
        found = self.canonical({"text": given[:most] if isinstance(given, list) else words_in(given, most)})
        if isinstance(found, str):
            raise DataError(found)
        return row | {"text": found["text"]}

    @classmethod
    def of(cls, config: TaskConfig) -> type[Task]:
        return PlainTags if are_plain(config.labels) else TokenClassification

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        return set((row["label"] or "").split())

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """O first, but for plain tags; then alphabetically."""
        names = {*labels}
        return sorted(names) if are_plain(names) else [OUTSIDE, *sorted(names - {OUTSIDE})]

    @staticmethod
    def known_as(labels: list[str], own: list[str]) -> list[str]:
        return own_names(labels, own)

    def unknown(self, row: Row) -> set[str]:
        return {*self._spelled(row)} - {*self.labels}

    @staticmethod
    def stratum(row: Row) -> str:
        """The kinds of entities in a row."""
        return " ".join(sorted({tag.partition("-")[2] for tag in (row["label"] or "").split()} - {""}))

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
        rows, words = (places == _CUT_OFF).nonzero()
        read[rows, words, self.labels.index(OUTSIDE) if OUTSIDE in self.labels else 0] = _UNREAD
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
        read = logits.any(axis=-1) & ((logits.max(axis=-1) != _UNREAD) | ((logits != 0).sum(axis=-1) > 1))
        return np.asarray((read * np.arange(1, read.shape[1] + 1)).max(axis=1))

    def agrees(self, logits: Array, reference: Array) -> Array:
        """bool [N]: all words have the same tags in both."""
        return np.asarray((logits.argmax(axis=-1) == reference.argmax(axis=-1)).all(axis=1))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """int64 [N, max_length]; −100, the index that losses ignore, where there is no tag."""
        index, most = {label: i for i, label in enumerate(self.labels)}, self.config.max_length
        tags = [self._spelled(row)[:most] for row in rows]
        return padded([[index[tag] for tag in of_row] for of_row in tags], most, NO_LABEL)

    def _spelled(self, row: Row) -> list[str]:
        """Return a row's tags as the model's labels name them."""
        return spelled((row.get("label") or "").split(), self.labels)

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

    def _tokenized(self, rows: Sequence[Row]) -> Iterator[Arrays]:
        """Add `places` [W]: the index of each word's first token."""
        for row, encoding in zip(rows, self._encodings(rows), strict=True):
            words = min(row["text"].count(" ") + 1, self.config.max_length) if row["text"] else 0
            places = np.full(words, _CUT_OFF, dtype=np.int64)
            for token in range(len(encoding.ids) - 1, -1, -1):
                if (word := encoding.word_ids[token]) is not None and word < len(places):
                    places[word] = token
            yield self._arrays(encoding) | {"places": places}


class PlainTags(TokenClassification):
    """Tags that form no entities, such as parts of speech: judged word by word."""

    metric: ClassVar = Metric("accuracy")

    @classmethod
    def unified(cls, rows: Sequence[Row]) -> tuple[Iterable[Row | str], str]:
        return rows, ""

    def _spelled(self, row: Row) -> list[str]:
        return (row.get("label") or "").split()

    def decode(self, logits: Array, rows: Sequence[Row]) -> list[TaggedText]:
        return [msgspec.structs.replace(one, plain=True) for one in super().decode(logits, rows)]

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array:
        right, words = self.stats(logits, rows).T
        return np.asarray(right == words)

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Correct words and words: float64 [N, 2]; words that the model does not read are wrong."""
        every = [(one.tags, row["label"].split()) for one, row in zip(self.decode(logits, rows), rows, strict=True)]
        counts = [[sum(map(eq, ours, theirs)), len(theirs)] for ours, theirs in every]
        return np.array(counts, dtype=np.float64).reshape(-1, 2)

    def value(self, sums: Array) -> Array:
        """The fraction of correct words; 1 where there are none."""
        return np.asarray(np.where(sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1), 1.0))

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """The fraction of texts without a wrong word."""
        return {"whole texts": float(self.correct(logits, rows).mean())}
