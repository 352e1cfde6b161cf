"""What a task says: everything that differs between text classification, tagging, language models, images and sound.

A task is a class in a file of its own. Its facts (class attributes) are read before there is any data; its methods turn
rows into arrays and outputs into answers. No task imports torch or transformers, and nothing outside asks which task it
is: CONTRIBUTING.md lists what a new one must hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeGuard

from kdexport.tasks.config import Arrays, Function, Items, Row, TaskConfig
from kdexport.tasks.menus import Menu
from kdexport.tasks.metrics import Array, Metric

Modality = Literal["text", "image", "audio"]
# How outputs are trained: the key of the losses and of what they read, on the torch side.
Objective = Literal["classes", "several", "number", "tokens", "next-token"]


class Card(NamedTuple):
    """How a model card says that the artifact is used."""

    tag: str
    optimum: str
    code: str


class Answer(Protocol):
    """The answer to one row."""

    def to_dict(self, scores: bool) -> dict[str, Any]:
        """Return what the command line prints, with every score if asked for."""


class Task(Protocol):
    """One task, opened for a model: its facts, and the way from rows to arrays and from outputs to answers.

    N rows have outputs [N, *answer_shape], here called logits, the same array as soft targets and on disk.
    """

    # --- facts of the class
    name: ClassVar[str]
    problem: ClassVar[str]
    """What `data.problem` calls this kind of answer."""
    problems: ClassVar[Mapping[str, type[Any]]]
    """`data.problem` → the class for it, of the same name."""
    modality: ClassVar[Modality]
    objective: ClassVar[Objective]
    function: ClassVar[Function]
    """From logits to scores."""
    metric: ClassVar[Metric]
    menu: ClassVar[Menu]
    card: ClassVar[Card]
    columns: ClassVar[Mapping[str, tuple[str, ...]]]
    """A row's keys, each with the names of columns that are taken for it unasked."""
    cuts: ClassVar[bool]
    """Whether long texts are cut into passages, each a row."""
    pairs: ClassVar[bool]
    """Whether a row may be a pair of texts."""
    auto_class: ClassVar[str]
    """The class of transformers that opens its models."""
    heads: ClassVar[tuple[str, ...]]
    """Parts of the names of architectures that were trained for it."""
    exporter: ClassVar[str]
    """What Optimum calls its export."""
    stands_for: ClassVar[tuple[str, str] | None]
    """Family and architecture by which other runtimes open a student that is a network of ours."""
    protocols: ClassVar[frozenset[str]]
    """The server's protocols that only some tasks answer: tei, openai, tgi."""
    generates: ClassVar[bool]
    """Whether it writes text: see `runtime.generation`."""
    one_label: ClassVar[bool]
    """Whether each row has exactly one label out of a few."""
    has_labels: ClassVar[bool]
    """Whether the logits have names, in `config.labels`."""
    has_names: ClassVar[bool]
    """Whether these names are found in the data."""
    has_words: ClassVar[bool]
    """Whether rows are words, which `ready` separates."""
    output: ClassVar[str]
    at_once: ClassVar[int]
    """Rows of a batch where speed does not matter."""

    config: TaskConfig
    labels: list[str]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open the task of a model folder (`task.json`) or an artifact (`kdexport.json`).

        Raises:
            ArtifactError: a file is missing or unreadable.
        """

    # --- rows

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        """Return a row of a file as the task reads it, or what is wrong with it."""

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        """Return what is wrong with the content or the label of a canonical row, or None."""

    @classmethod
    def content(cls, row: Row) -> str:
        """Return what a model sees of a row: rows of equal content get equal logits."""

    @classmethod
    def title(cls, row: Row) -> str:
        """Return what a row is called in reports."""

    @staticmethod
    def labels_of(row: Row) -> set[str]:
        """Return the names of a row's labels."""

    @staticmethod
    def ordered(labels: Iterable[str]) -> list[str]:
        """Return label names in the order of the logits."""

    @staticmethod
    def stratum(row: Row) -> str:
        """Return what is spread evenly over splits."""

    def row(self, given: object) -> dict[str, Any]:
        """Return the row of what a caller wants answered: a text, a pair, words, a path or bytes.

        Raises:
            DataError: it is something else.
        """

    def ready(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of plain text as the task reads it."""

    def probes(self) -> list[dict[str, Any]]:
        """Return rows at the edges of what may come in."""

    def examples(self) -> list[dict[str, Any]]:
        """Return typical rows."""

    # --- rows → arrays

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        """Return the arrays of each row by itself, without the batch's axis."""

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Return the batch of encoded rows, padded to the longest."""

    def encode(self, rows: Sequence[Row]) -> Arrays:
        """Return the batch of rows."""

    def graph_inputs(self, arrays: Arrays) -> Arrays:
        """Return the part of a batch that the graph reads."""

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """Return the logits [B, *answer_shape] of a batch from its graph's output."""

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        """Return the length of each encoded row, which batches are sorted by."""

    def lengths(self) -> list[int]:
        """Return the lengths at which speed is measured; none where there is one only."""

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """Return a batch of one row of exactly this length."""

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the names of the dynamic axes of every input and of the output."""

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """Return what a user should know of how these rows are read."""

    # --- outputs → answers

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """The shape of one row's logits."""

    def decode(self, logits: Array, rows: Sequence[Row]) -> Sequence[Answer]:
        """Return the answer to each row."""

    def scores(self, logits: Array, function: str | None = None) -> Array:
        """Return the scores float64 of logits, by `function` or the model's own."""

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Return how sure each row's answer is, float64 [N]."""

    def agrees(self, logits: Array, reference: Array) -> Array:
        """Return whether, or how far, each row has the same answer in both: [N]."""

    def difference(self, logits: Array, reference: Array) -> float:
        """Return the largest difference of two outputs."""

    def label_array(self, rows: Iterable[Row]) -> Array:
        """Return the rows' labels as the objective's label loss reads them, marked where there is none."""

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array | None:
        """Return whether each row is answered rightly, bool [N]; None where an answer is not right or wrong."""

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Return the sufficient statistics of the metric, float64 [N, K]: sums over rows give its value."""

    def value(self, sums: Array) -> Array:
        """Return the metric of sums [..., K] of statistics."""

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Return the metrics beside the one that counts."""

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        """Return what is labelled, one by one: rows, labels of rows, or words."""

    def chosen(self, items: Items) -> Array:
        """Return the label that each item is given: int64 [M]."""


class Generates(Task, Protocol):
    """A task that writes text."""

    def prompt(self, text: str, room: int) -> list[int]:
        """Return the last tokens of a text that leave room for so many more."""

    def text_of(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special ones."""

    def log_probs(self, packed: Array) -> Array:
        """Return the log probabilities of a text's own tokens: logits [..., T, 1 + 2k] → [..., T]."""


def can_generate(task: Task) -> TypeGuard[Generates]:
    """Whether a task writes text."""
    return task.generates


class ReadsTexts(Task, Protocol):
    """A task of the modality text."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""

    def cost(self, row: Row) -> int:
        """Estimate the tokens that a row takes, from its characters alone."""

    def is_cut(self, row: Row) -> bool:
        """Whether a row has more tokens than are read."""


class ReadsFiles(Task, Protocol):
    """A task of images or of sound."""

    def shapes(self) -> dict[str, list[int]]:
        """Return the graph's inputs as clients may send them, float32; −1 is any size."""

    def seconds(self, row: Row) -> float:
        """Estimate the seconds that decoding a row takes, from its header.

        Raises:
            DataError: it can't be read, or decoding it would cost too much.
        """


def reads_texts(task: Task) -> TypeGuard[ReadsTexts]:
    """Whether a task's rows are texts."""
    return task.modality == "text"


def reads_files(task: Task) -> TypeGuard[ReadsFiles]:
    """Whether a task's rows are images or recordings."""
    return task.modality != "text"
