"""What specs may ask for, by the kind of input; each task takes one of these and changes what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Menu(NamedTuple):
    """What a spec may ask of a task, and what it gets where it asks for nothing."""

    students: frozenset[str]
    """Kinds of students, as `spec.derive.Shape.kind` names them."""
    instead: str
    """What to suggest in place of another kind."""
    default: str
    """The student without a budget."""
    ladder: tuple[str, ...]
    """The students that a search tries, from the smallest on."""
    losses: tuple[str, ...]
    """Losses of outputs and of layers; the first is the default."""
    temperature: float | None = 2.0
    """The default; None where softened probabilities make no sense, and only 1 is allowed."""
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    augment: bool = True
    vocabulary: Literal["corpus", "whole"] = "corpus"
    """The tokens of a student made from the teacher, by default."""
    teachers: frozenset[str] = frozenset({"torch", "adapter", "onnx", "stored"})
    ensemble: bool = True
    """Whether several teachers, or several passes of one, can be combined."""
    unused: Mapping[str, str] = {}
    """Keys of the spec without an effect, and what to do about each."""


OF_OUTPUTS = ("kl", "reverse-kl", "jsd", "soft-ce", "mse", "bce", "dkd", "dist")
OF_LAYERS = ("hidden", "attention", "relation")
# Students made of a teacher: some of its layers, or another model of the same kind.
_LAYERS = frozenset({"lowest", "spread", "named", "model"})

TEXTS = Menu(
    students=_LAYERS | {"narrow", "network"},
    instead="Take tiny, bag, cnn or layers:2",
    default="tiny",
    ladder=("bag", "cnn", "tiny", "2x256", "layers:1", "layers:2"),
    losses=(*OF_OUTPUTS, *OF_LAYERS),
    unused={"distill.samples": "Remove it, or take augment"},
)
MEDIA = Menu(
    students=_LAYERS | {"conv"},
    instead="Take conv, conv:32 or layers:2",
    default="conv",
    ladder=("conv:8", "conv", "conv:24", "conv:32"),
    losses=OF_OUTPUTS,
    augment=False,
    teachers=frozenset({"torch"}),
    unused={
        "distill.samples": "Remove it",
        **dict.fromkeys(("data.text_pair", "data.max_length", "data.max_chars"), "Remove it: it is of texts"),
        **dict.fromkeys(
            ("student.vocabulary", "student.embedding", "student.start"),
            "Remove it: it is of students that read texts",
        ),
    },
)
