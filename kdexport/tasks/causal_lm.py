"""Language modelling: the probabilities of each next token of a text.

A row's output is packed, [max_length, 1 + 2k], as full [T, V] logits would take gigabytes. For each predicted token:

    log p of the actual token · id and log p of the most probable · … · id and log p of the k-th

Metrics read the first three columns only. A teacher's outputs have k = 64 and are soft targets: the 48 most probable
tokens, and 16 samples of the rest, which make the estimate of its distribution unbiased (Anshumann et al. 2025,
https://arxiv.org/abs/2503.16870). On disk a token takes 260 bytes (`packed.compact`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from kdexport.tasks.base import Generates, Objective
from kdexport.tasks.card import Card
from kdexport.tasks.config import NO_LABEL, Arrays, Function, Row
from kdexport.tasks.inputs.texts import CHARS_PER_TOKEN, SPARE, Texts, padded
from kdexport.tasks.menus import TEXTS
from kdexport.tasks.metrics import Array, Metric, log_softmax
from kdexport.tasks.packed import BEST, LOG_P, compact, packed_lines, whole

# Below this token accuracy a teacher is no better than chance.
_CHANCE = 0.02


class LanguageModelScores(msgspec.Struct, frozen=True):
    """How likely a text is: number of predicted tokens, top-1 accuracy, bits per byte."""

    tokens: int
    accuracy: float
    bits_per_byte: float

    def to_dict(self, scores: bool) -> dict[str, Any]:
        return {name: round(value, 6) for name, value in msgspec.structs.asdict(self).items()}


class CausalLM(Texts, Generates):
    """Rows `{"text": …}` → packed log probabilities [N, max_length, 1 + 2k]; the labels are the tokens themselves."""

    name: ClassVar = "causal-lm"
    metric: ClassVar = Metric("bits per byte", higher_is_better=False, kind="number")
    objective: ClassVar[Objective] = "next-token"
    function: ClassVar[Function] = "none"
    menu: ClassVar = TEXTS._replace(
        students=TEXTS.students - {"network"},
        instead="Take tiny, 4x192 or layers:2",
        ladder=("2x128", "2x256", "layers:1", "layers:2"),
        losses=("kl", "reverse-kl", "jsd", "soft-ce", "mse"),  # defined on a subset of the tokens
        alpha=0.9,
        temperature=None,  # packed outputs hold the probabilities at T = 1
        precisions=(*TEXTS.precisions, "int4"),
        augment=False,
        vocabulary="whole",
        teachers=frozenset({"torch"}),
        ensemble=False,
        unused=dict.fromkeys(
            ("data.text_pair", "data.label", "student.vocabulary", "student.embedding", "distill.augment"), "Remove it"
        ),
    )
    card: ClassVar = Card(
        "text-generation",
        "ORTModelForCausalLM",
        '\nmodel = kdexport.load("path/to/this/folder")\n'
        'print(kdexport.write(model, "Once upon a time", kdexport.Sampling(max_new_tokens=40)).completion)',
    )
    auto_class: ClassVar = "AutoModelForCausalLM"
    heads: ClassVar = ("LMHeadModel", "ForCausalLM")
    protocols: ClassVar = frozenset({"openai", "tgi"})
    cuts: ClassVar = True
    has_labels: ClassVar = False
    has_names: ClassVar = False
    at_once: ClassVar = 8  # a row has T × V logits
    columns: ClassVar[dict[str, tuple[str, ...]]] = {"text": ("text", "content", "document", "body")}

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        return "there are texts alone" if all(isinstance(row["text"], str) for row in rows) else ""

    @staticmethod
    def canonical(row: dict[str, Any]) -> dict[str, Any] | str:
        """Language modelling has no label column."""
        return row | {"label": ""}

    def ready(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {"label": ""}

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        return Texts.check(row, max_chars, needs_label=False)

    @property
    def answer_shape(self) -> tuple[int, ...]:
        return self.config.max_length, 1 + 2 * self.config.kept

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Add `places` [B, T − 1]: the positions that predict a token, −1 elsewhere."""
        batch = super().collate(encoded)
        sizes = np.array(self.sizes(encoded))[:, None]
        places = np.arange(max(1, sizes.max() - 1))[None]
        batch["places"] = np.where(places < sizes - 1, places, -1)
        return batch

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """Pack the graph's logits [B, T, V]; zeros where no token was predicted."""
        ids, k = arrays["input_ids"], self.config.kept
        packed = np.zeros((len(output), *self.answer_shape), dtype=np.float32)
        for i, (tokens, mask) in enumerate(zip(ids, arrays["attention_mask"], strict=True)):
            n = int(mask.sum())
            if n < 2:
                continue
            packed[i, : n - 1] = packed_lines(log_softmax(output[i, : n - 1]), tokens[1:n], k, tokens[:n])
        return packed

    def prompt(self, text: str, room: int) -> list[int]:
        # Only the end of a long text is tokenised, doubled until it yields enough tokens.
        wanted = max(1, self.config.max_length - room)
        size = (wanted + SPARE) * CHARS_PER_TOKEN
        while True:
            tail = text[-size:]
            ids = list(self._tokenizer.encode(tail).ids)
            if len(ids) >= wanted + SPARE or len(tail) == len(text):
                return ids[-wanted:] or [self.config.end_id or 0]
            size *= 2

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """The mean log probability of each row's tokens."""
        counts = self.stats(logits, rows)
        return np.asarray(-counts[:, 2] / np.maximum(counts[:, 1], 1))

    def decode(self, logits: Array, rows: Sequence[Row]) -> list[LanguageModelScores]:
        return [
            LanguageModelScores(int(tokens), right / max(tokens, 1), nats / math.log(2) / max(size, 1))
            for right, tokens, nats, size in self.stats(logits, rows).tolist()
        ]

    def agrees(self, logits: Array, reference: Array) -> Array:
        """The fraction of tokens with the same most probable token in both."""
        there = reference[..., LOG_P] < 0
        same = (logits[..., BEST] == reference[..., BEST]) & there
        return np.asarray(same.sum(axis=1) / np.maximum(there.sum(axis=1), 1))

    def difference(self, logits: Array, reference: Array) -> float:
        """max |Δ log p| of the actual tokens and of the most probable ones."""
        return max(float(np.abs(logits[..., i] - reference[..., i]).max()) for i in (LOG_P, BEST + 1))

    def label_array(self, rows: Iterable[Row]) -> Array:
        """The predicted tokens, int64 [N, max_length]; −100, the index that losses ignore, elsewhere."""
        predicted = [arrays["input_ids"][1:] for arrays in self.tokenize(list(rows))]
        return padded(predicted, self.config.max_length, NO_LABEL)

    def batch_labels(self, rows: Sequence[Row], encoded: Sequence[Arrays]) -> Array:
        return padded([arrays["input_ids"][1:] for arrays in encoded], self.config.max_length, NO_LABEL)

    def pack(self, logits: Array) -> Array:
        return compact(logits, self.vocabulary)

    def unpack(self, packed: Array) -> Array:
        return whole(packed)

    def judged(self, logits: Array) -> Array:
        """The actual token's log p, the most probable token and its log p."""
        return logits[..., : BEST + 2]

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Top-1 correct tokens, tokens, nats, and the bytes of these tokens: float64 [N, 4]."""
        counts = np.zeros((len(rows), 4))
        for i, (row, encoding) in enumerate(zip(rows, self._encodings(rows, offsets=True), strict=True)):
            n = len(encoding.ids) - 1
            if n < 1:
                continue
            ids = np.array(encoding.ids[1:])
            spelled = row["text"][encoding.offsets[1][0] : encoding.offsets[-1][1]]
            nats = -logits[i, :n, LOG_P].astype(np.float64).sum()
            counts[i] = (logits[i, :n, BEST] == ids).sum(), n, nats, len(spelled.encode())
        return counts

    def value(self, sums: Array) -> Array:
        """Bits per byte, which are comparable across tokenizers."""
        return np.asarray(sums[..., 2] / math.log(2) / np.maximum(sums[..., 3], 1))

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        return self.further(logits, rows)["token accuracy"] < _CHANCE

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Top-1 accuracy and perplexity, both by token."""
        right, tokens, nats, _ = self.stats(logits, rows).sum(axis=0)
        return {"token accuracy": float(right / max(tokens, 1)), "perplexity": float(np.exp(nats / max(tokens, 1)))}

    def scores(self, logits: Array, function: str | None = None) -> Array:
        return logits
