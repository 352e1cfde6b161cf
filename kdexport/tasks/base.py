"""The interface of a task: all differences between text classification, tagging, language models, images and sound.

A task is a class in a file of its own. Its class attributes are known before any data; its methods turn rows into
arrays and outputs into answers. No task imports torch or transformers, and no other code asks which task it is.
Methods that raise NotImplementedError are abstract; the others are defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeGuard

import numpy as np

from kdexport.errors import DataError
from kdexport.tasks.card import Card
from kdexport.tasks.config import Arrays, Function, Items, Row, TaskConfig
from kdexport.tasks.menus import Menu
from kdexport.tasks.metrics import Array, Keeps, Metric, sigmoid, softmax

if TYPE_CHECKING:
    from kdexport.tasks.inputs.media import Media
    from kdexport.tasks.inputs.texts import Texts
    from kdexport.tasks.sentence_embedding import SentenceEmbedding
    from kdexport.tasks.speech_seq2seq import SpeechSeq2Seq
    from kdexport.tasks.transcripts import Transcripts

Modality = Literal["text", "image", "audio"]
# How outputs are trained: the key of the losses in `distill`.
Objective = Literal["classes", "several", "number", "tokens", "next-token", "ctc", "vectors", "ranking"]


class Answer(Protocol):
    """The prediction for one row."""

    def to_dict(self, scores: bool) -> dict[str, Any]:
        """Return the command line's output for it, optionally with all scores."""


class Task:
    """A task, loaded for a model.

    N rows have outputs [N, *answer_shape], called logits here; soft targets in memory and on disk have the same shape.
    """

    # --- facts
    name: ClassVar[str]
    problem: ClassVar[str] = "single-label"  # the value of `data.problem`
    modality: ClassVar[Modality]
    objective: ClassVar[Objective]
    function: ClassVar[Function] = "softmax"  # logits → scores
    functions: ClassVar[frozenset[Function]] = frozenset()  # others that teachers may have, where only order counts
    metric: ClassVar[Metric]
    menu: ClassVar[Menu]
    card: ClassVar[Card]
    columns: ClassVar[Mapping[str, tuple[str, ...]]]  # keys of a row → column names recognised by default
    auto_class: ClassVar[str]  # the Auto class of transformers that loads its models
    heads: ClassVar[tuple[str, ...]]  # parts of the names of architectures trained for this task
    marks: ClassVar[tuple[str, ...]] = ()  # keys of a configuration that tell it from other tasks of the same heads
    # Family and architecture that let other runtimes load a student with an architecture of ours.
    stands_for: ClassVar[tuple[str, str] | None] = None
    protocols: ClassVar[frozenset[str]] = frozenset()  # task-specific server protocols: tei, openai, tgi
    generates: ClassVar[bool] = False  # generates text: see `runtime.generation`
    transcribes: ClassVar[bool] = False  # each answer is a `Transcript`, which a teacher can write for unlabelled rows
    one_label: ClassVar[bool] = False  # each row has exactly one label of a fixed set
    has_labels: ClassVar[bool] = True  # the logits have names, `config.labels`
    has_names: ClassVar[bool] = True  # these names come from the data
    label_word: ClassVar[str] = "classes"  # what the labels are
    has_words: ClassVar[bool] = False  # rows are lists of words, which `ready` splits
    cuts: ClassVar[bool] = False  # long texts are split into passages, each a row
    pairs: ClassVar[bool] = False  # a row may be a pair of texts
    together: ClassVar[bool] = False  # rows of one `unit` are trained on and judged together
    embeds: ClassVar[bool] = False  # the answers are vectors
    labels_judge: ClassVar[bool] = False  # labels judge, and teach nothing: rows need none, and there is no baseline
    int8: ClassVar = Keeps(0.99, "gives fp32's answer on {:.1%} of {:,} rows")
    adds_up: ClassVar[bool] = True  # statistics of parts of a split add up to the metric
    output: ClassVar[str] = "logits"
    also: ClassVar[tuple[str, ...]] = ()  # further outputs of the graph, for other runtimes
    usual_length: ClassVar[int] = 128  # most tokens of a text, where data.max_length is absent
    at_once: ClassVar[int] = 32  # the default batch size where speed does not matter
    alone: bool = False  # padding would change a row's logits, so each row is a batch

    config: TaskConfig
    labels: list[str]

    @classmethod
    def kinds(cls) -> dict[str, type[Task]]:
        """Return the class for each supported `data.problem`."""
        return {cls.problem: cls}

    @classmethod
    def of(cls, config: TaskConfig) -> type[Task]:
        """Return the class for a model's configuration."""
        return next((kind for kind in cls.kinds().values() if kind.function == config.function), cls)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the task of a model folder or an artifact; raise ArtifactError if a file is missing or unreadable."""
        raise NotImplementedError

    def restrict(self, words: Iterable[str]) -> None:
        """Let answers have these words alone; raise DataError where no answer is a transcript."""
        raise DataError(f"a list of words is of speech recognition; this model is for {self.name}", "Leave it out")

    # --- rows

    @classmethod
    def signs(cls, rows: Sequence[Row]) -> str:
        """Return what shows that these rows, the first of a file, are of this task, or an empty text.

        A run whose spec names no task takes the one that finds a sign.
        """
        return ""

    @classmethod
    def canonical(cls, row: dict[str, Any]) -> dict[str, Any] | str:
        """Convert a row of a file to the task's format, or return the reason why it is invalid."""
        raise NotImplementedError

    @staticmethod
    def check(row: Row, max_chars: int, needs_label: bool = True) -> str | None:
        """Return the reason why a canonical row's content or label is invalid, or None."""
        raise NotImplementedError

    @classmethod
    def parts(cls, row: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """Return the rows that one row of a file becomes, with ids."""
        return [{"id": name} | row]

    @classmethod
    def unit(cls, row: Row) -> str:
        """Return the key of rows that belong to one split."""
        return cls.content(row)

    @staticmethod
    def shared(row: Row) -> bool:
        """Return whether a row belongs to every split, such as a document that is searched."""
        return False

    @classmethod
    def misfit(cls, rows: Sequence[Row]) -> str:
        """Return the reason why the rows of a split can't judge a model, or an empty text."""
        return ""

    @classmethod
    def unified(cls, rows: Sequence[Row]) -> tuple[Iterable[Row | str], str]:
        """Convert labels that only all rows of the data explain, such as tags.

        Return each row, or the reason why it is invalid, or `rows` where nothing changes; and a remark for the user, or
        an empty text.
        """
        return rows, ""

    @classmethod
    def content(cls, row: Row) -> str:
        """Return the model-visible part of a row; rows of equal content get equal logits."""
        raise NotImplementedError

    @classmethod
    def likeness(cls, row: Row) -> str:
        """Return the part of a row that its duplicates have as well."""
        return cls.content(row)

    @classmethod
    def title(cls, row: Row) -> str:
        """Return the row's title in reports."""
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
    def known_as(labels: list[str], own: list[str]) -> list[str]:
        """Return the names of the data's labels among a model's `own`, where the task allows others."""
        return labels

    def unknown(self, row: Row) -> set[str]:
        """Return the names of a row's labels that the model does not have."""
        return self.labels_of(row) - {*self.labels}

    @staticmethod
    def stratum(row: Row) -> str:
        """Return the key by which splits are stratified."""
        return ""

    def row(self, given: object) -> dict[str, Any]:
        """Convert an input of `predict` (text, pair, words, path or bytes) to a row; raise DataError for any other."""
        raise NotImplementedError

    def ready(self, row: dict[str, Any]) -> dict[str, Any]:
        """Convert a row of plain text to the task's format."""
        return row

    def probes(self) -> list[dict[str, Any]]:
        """Return edge-case rows."""
        raise NotImplementedError

    def examples(self) -> list[dict[str, Any]]:
        """Return typical rows."""
        raise NotImplementedError

    # --- rows → arrays

    def tokenize(self, rows: Sequence[Row]) -> Sequence[Arrays]:
        """Return the arrays of each row, without a batch axis."""
        raise NotImplementedError

    def collate(self, encoded: Sequence[Arrays]) -> Arrays:
        """Batch encoded rows, padded to the longest."""
        return {name: np.stack([arrays[name] for arrays in encoded]) for name in self.config.inputs}

    def encode(self, rows: Sequence[Row]) -> Arrays:
        """Encode and batch rows."""
        encoded = list(self.tokenize(rows))
        if len(encoded) == 1:  # a shortcut, for latency
            return {name: array[np.newaxis] for name, array in encoded[0].items()}
        return self.collate(encoded)

    def graph_inputs(self, arrays: Arrays) -> Arrays:
        """Return a batch's inputs of the graph."""
        return {name: arrays[name] for name in self.config.inputs}

    def gather(self, output: Array, arrays: Arrays) -> Array:
        """Convert the graph's output for a batch to logits [B, *answer_shape]."""
        return output

    def sizes(self, encoded: Sequence[Arrays]) -> list[int]:
        """Return the length of each encoded row; batches are sorted by it."""
        return [1] * len(encoded)

    def duration(self, row: Row) -> float | None:
        """Return the seconds of a row's recording that are read; None where rows are no recordings."""
        return None

    def lengths(self) -> list[int]:
        """Return the lengths to benchmark; empty where all inputs have the same length."""
        return []

    def sized(self, rows: Sequence[Row], length: int) -> Arrays:
        """Return a batch of one row of exactly this length."""
        return self.encode(rows[:1])

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the names of the dynamic axes of all inputs and of the output."""
        raise NotImplementedError

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """Return remarks for the user on how these rows are read, such as truncation."""
        return []

    def known(self, row: Row) -> Array | None:
        """Return the teacher's logits of a row whose label the teacher gave; None where it is to be asked."""
        return None

    # --- outputs → answers

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """The shape of one row's logits."""
        return (len(self.labels),)

    def decode(self, logits: Array, rows: Sequence[Row]) -> Sequence[Answer]:
        """Return the answer for each row."""
        raise NotImplementedError

    def scores(self, logits: Array, function: str | None = None) -> Array:
        """Return float64 scores of logits [..., C].

        `function` is softmax (scores sum to 1), sigmoid (independent scores) or none (logits); default: the model's.
        """
        return _FUNCTIONS[function or self.config.function](logits.astype(np.float64))

    def pack(self, logits: Array) -> Array:
        """Return soft targets [B, *answer_shape] as they stand on disk, [B, …]: see `unpack`."""
        return logits

    def unpack(self, packed: Array) -> Array:
        """Return soft targets from disk as float32 [B, *answer_shape]."""
        return packed

    def judged(self, logits: Array) -> Array:
        """Return the part of logits [B, …] that metrics and comparisons read."""
        return logits

    def confidence(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Return each row's confidence, float64 [N]."""
        raise NotImplementedError

    def agrees(self, logits: Array, reference: Array) -> Array:
        """Return for each row whether both have the same answer, or the fraction that is the same: [N]."""
        raise NotImplementedError

    def compared(self, logits: Array, reference: Array) -> dict[str, float]:
        """Return further comparisons with the teacher, by name."""
        return {}

    def difference(self, logits: Array, reference: Array) -> float:
        """Return max |Δlogit|."""
        return float(np.abs(logits - reference).max())

    def label_array(self, rows: Iterable[Row]) -> Array:
        """Return the labels in the format of the objective's label loss; missing ones are marked."""
        raise NotImplementedError

    def batch_labels(self, rows: Sequence[Row], encoded: Sequence[Arrays]) -> Array:
        """Return the labels of a few encoded rows, as `label_array` does."""
        return self.label_array(rows)

    def correct(self, logits: Array, rows: Sequence[Row]) -> Array | None:
        """Return whether each row's answer is correct, bool [N]; None where answers aren't right or wrong."""
        return None

    def stats(self, logits: Array, rows: Sequence[Row]) -> Array:
        """Return the metric's sufficient statistics, float64 [N, K]: their sums over rows determine its value."""
        raise NotImplementedError

    def value(self, sums: Array) -> Array:
        """Return the metric for summed statistics [..., K]."""
        raise NotImplementedError

    def is_chance(self, logits: Array, rows: Sequence[Row]) -> bool:
        """Return whether a teacher with these logits on labelled rows is no better than chance."""
        return False

    def further(self, logits: Array, rows: Sequence[Row]) -> dict[str, float]:
        """Return secondary metrics."""
        return {}

    def items(self, rows: Sequence[Row], logits: Array) -> Items:
        """Return the labelled items: rows, labels of rows, or words; none by default."""
        none = np.zeros(0, dtype=np.int64)
        return Items(none, none, np.zeros((0, 1)))

    def chosen(self, items: Items) -> Array:
        """Return the predicted label of each item: int64 [M]."""
        return np.asarray(items.logits.argmax(axis=1))


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {"softmax": softmax, "sigmoid": sigmoid, "none": np.asarray}


class Generates(Task):
    """A task that generates text."""

    generates = True

    def prompt(self, text: str, room: int) -> list[int]:
        """Return the last tokens of a text that leave room for this many new ones."""
        raise NotImplementedError

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode tokens, without special ones."""
        raise NotImplementedError


def can_generate(task: Task) -> TypeGuard[Generates]:
    """Return whether a task generates text."""
    return task.generates


def can_transcribe(task: Task) -> TypeGuard[Transcripts]:
    """Return whether the answers of a task are transcripts."""
    return task.transcribes


def can_embed(task: Task) -> TypeGuard[SentenceEmbedding]:
    """Return whether the answers of a task are vectors."""
    return task.embeds


def writes_speech(task: Task) -> TypeGuard[SpeechSeq2Seq]:
    """Return whether a task writes its transcripts token by token."""
    return task.config.decoder is not None


def reads_texts(task: Task) -> TypeGuard[Texts]:
    """Return whether a task's rows are texts."""
    return task.modality == "text"


def reads_files(task: Task) -> TypeGuard[Media]:
    """Return whether a task's rows are images or recordings."""
    return task.modality != "text"
