"""The seam: everything that differs between text classification, tagging, language models, images and sound.

A task is a class in a file of its own. Its facts (class attributes) are read before there is any data; its methods turn
rows into arrays and outputs into answers. No task imports torch or transformers, and nothing outside asks which task it
is. What most tasks do alike stands here; what raises NotImplementedError every task says for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeGuard

import numpy as np

from kdexport.tasks.config import Arrays, Function, Items, Row, TaskConfig
from kdexport.tasks.menus import Menu
from kdexport.tasks.metrics import Array, Metric, sigmoid, softmax

if TYPE_CHECKING:
    from kdexport.tasks.inputs.media import Media
    from kdexport.tasks.inputs.texts import Texts

Modality = Literal["text", "image", "audio"]
# How outputs are trained: the key of the losses and of what they read, on the torch side.
Objective = Literal["classes", "several", "number", "tokens", "next-token"]


class Card(NamedTuple):
    """How a model card says that the artifact is used: the hub's name of the task, Optimum's class, and Python."""

    tag: str
    optimum: str
    code: str


class Answer(Protocol):
    """The answer to one row."""

    def to_dict(self, scores: bool) -> dict[str, Any]:
        """Return what the command line prints, with every score if asked for."""


class Task:
    """One task, opened for a model: its facts, and the way from rows to arrays and from outputs to answers.

    N rows have outputs [N, *answer_shape], here called logits, the same array as soft targets and on disk.
    """

    # --- facts
    name: ClassVar[str]
    problem: ClassVar[str] = "single-label"
    """What `data.problem` calls this kind of answer."""
    modality: ClassVar[Modality]
    objective: ClassVar[Objective]
    function: ClassVar[Function] = "softmax"
    """From logits to scores."""
    metric: ClassVar[Metric]
    menu: ClassVar[Menu]
    card: ClassVar[Card]
    columns: ClassVar[Mapping[str, tuple[str, ...]]]
    """A row's keys, each with the names of columns that are taken for it unasked."""
    auto_class: ClassVar[str]
    """The class of transformers that opens its models."""
    heads: ClassVar[tuple[str, ...]]
    """Parts of the names of architectures that were trained for it."""
    exporter: ClassVar[str]
    """What Optimum calls its export."""
    stands_for: ClassVar[tuple[str, str] | None] = None
    """Family and architecture by which other runtimes open a student that is a network of ours."""
    protocols: ClassVar[frozenset[str]] = frozenset()
    """The server's protocols that only some tasks answer: tei, openai, tgi."""
    generates: ClassVar[bool] = False
    """Whether it writes text: see `runtime.generation`."""
    one_label: ClassVar[bool] = False
    """Whether each row has exactly one label out of a few."""
    has_labels: ClassVar[bool] = True
    """Whether the logits have names, in `config.labels`."""
    has_names: ClassVar[bool] = True
    """Whether these names are found in the data."""
    has_words: ClassVar[bool] = False
    """Whether rows are words, which `ready` separates."""
    cuts: ClassVar[bool] = False
    """Whether long texts are cut into passages, each a row."""
    pairs: ClassVar[bool] = False
    """Whether a row may be a pair of texts."""
    output: ClassVar[str] = "logits"
    at_once: ClassVar[int] = 32
    """Rows of a batch where speed does not matter."""

    config: TaskConfig
    labels: list[str]

    @classmethod
    def kinds(cls) -> dict[str, type[Task]]:
        """Return the class for each `data.problem` that the task knows."""
        return {cls.problem: cls}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open the task of a model folder (`task.json`) or an artifact (`kdexport.json`).

        Raises:
            ArtifactError: a file is missing or unreadable.
        """
        raise NotImplementedError

    # --- rows

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        """Return a row of a file as the task reads it, or what is wrong with it."""
        raise NotImplementedError

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        """Return what is wrong with the content or the label of a canonical row, or None."""
        raise NotImplementedError

    @classmethod
    def content(cls, row: Row) -> str:
        """Return what a model sees of a row: rows of equal content get equal logits."""
        raise NotImplementedError

    @classmethod
    def title(cls, row: Row) -> str:
        """Return what a row is called in reports."""
        raise NotImplementedError

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        """Return the names of a row's labels."""
        return set()

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """Return label names in the order of the logits."""
        return []

    @staticmethod
    def stratum(row: Row) -> str:
        """Return what is spread evenly over splits."""
        return ""

    def row(self, given: object) -> dict[str, Any]:
        """Return the row of what a caller wants answered: a text, a pair, words, a path or bytes.

        Raises:
            DataError: it is something else.
        """
        raise NotImplementedError

    def ready(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of plain text as the task reads it."""
        return row

    def probes(self) -> list[dict[str, Any]]:
        """Return rows at the edges of what may come in."""
        raise NotImplementedError

    def examples(self) -> list[dict[str, Any]]:
        """Return typical rows."""
        raise NotImplementedError

    # --- rows → arrays

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        """Return the arrays of each row by itself, without the batch's axis."""
        raise NotImplementedError

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Return the batch of encoded rows, padded to the longest."""
        return {name: np.stack([arrays[name] for arrays in encoded]) for name in self.config.inputs}

    def encode(self, rows: Sequence[Row]) -> Arrays:
        """Return the batch of rows."""
        return self.collate(list(self.tokenize(rows)))

    def graph_inputs(self, arrays: Arrays) -> Arrays:
        """Return the part of a batch that the graph reads."""
        return {name: arrays[name] for name in self.config.inputs}

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """Return the logits [B, *answer_shape] of a batch from its graph's output."""
        return output

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        """Return the length of each encoded row, which batches are sorted by."""
        return [1] * len(encoded)

    def lengths(self) -> list[int]:
        """Return the lengths at which speed is measured; none where there is one only."""
        return []

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """Return a batch of one row of exactly this length."""
        return self.encode(rows[:1])

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the names of the dynamic axes of every input and of the output."""
        raise NotImplementedError

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """Return what a user should know of how these rows are read."""
        return []

    # --- outputs → answers

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """The shape of one row's logits."""
        return (len(self.labels),)

    def decode(self, logits: Array, rows: Sequence[Row]) -> Sequence[Answer]:
        """Return the answer to each row."""
        raise NotImplementedError

    def scores(self, logits: Array, function: str | None = None) -> Array:
        """Return the scores float64 of logits.

        Args:
            logits: [..., C].
            function: softmax (they sum to 1), sigmoid (each by itself) or none (the logits); the model's when None.
        """
        return _FUNCTIONS[function or self.config.function](logits.astype(np.float64))

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Return how sure each row's answer is, float64 [N]."""
        raise NotImplementedError

    def agrees(self, logits: Array, reference: Array) -> Array:
        """Return whether, or how far, each row has the same answer in both: [N]."""
        raise NotImplementedError

    def difference(self, logits: Array, reference: Array) -> float:
        """Return the largest difference of two outputs: max |Δlogit|."""
        return float(np.abs(logits - reference).max())

    def label_array(self, rows: Iterable[Row]) -> Array:
        """Return the rows' labels as the objective's label loss reads them, marked where there is none."""
        raise NotImplementedError

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array | None:
        """Return whether each row is answered rightly, bool [N]; None where an answer is not right or wrong."""
        return None

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Return the sufficient statistics of the metric, float64 [N, K]: sums over rows give its value."""
        raise NotImplementedError

    def value(self, sums: Array) -> Array:
        """Return the metric of sums [..., K] of statistics."""
        raise NotImplementedError

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        """Whether a teacher with these logits of labelled rows knows next to nothing, where no label shows it."""
        return False

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Return the metrics beside the one that counts."""
        return {}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        """Return what is labelled, one by one: rows, labels of rows, or words; none by default."""
        none = np.zeros(0, dtype=np.int64)
        return Items(none, none, np.zeros((0, 1)))

    def chosen(self, items: Items) -> Array:
        """Return the label that each item is given: int64 [M]."""
        return np.asarray(items.logits.argmax(axis=1))


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {"softmax": softmax, "sigmoid": sigmoid, "none": np.asarray}


class Generates(Task):
    """A task that writes text."""

    generates = True

    def prompt(self, text: str, room: int) -> list[int]:
        """Return the last tokens of a text that leave room for so many more."""
        raise NotImplementedError

    def text_of(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special ones."""
        raise NotImplementedError

    def log_probs(self, packed: Array) -> Array:
        """Return the log probabilities of a text's own tokens: logits [..., T, 1 + 2k] → [..., T]."""
        raise NotImplementedError


def can_generate(task: Task) -> TypeGuard[Generates]:
    """Whether a task writes text."""
    return task.generates


def reads_texts(task: Task) -> TypeGuard[Texts]:
    """Whether a task's rows are texts."""
    return task.modality == "text"


def reads_files(task: Task) -> TypeGuard[Media]:
    """Whether a task's rows are images or recordings."""
    return task.modality != "text"
