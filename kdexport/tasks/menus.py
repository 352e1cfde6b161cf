"""The settings that a spec may choose, by modality; each task takes one menu and overrides the differences."""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Menu(NamedTuple):
    """The allowed values and defaults of a task's settings."""

    students: frozenset[str]  # kinds of students, `spec.derive.Shape.kind`, or one of networks from random weights
    instead: str  # the suggestion for an unsupported kind
    default: str  # the student without a budget
    ladder: tuple[str, ...]  # the students in a search, smallest first
    losses: tuple[str, ...]  # of outputs and of layers; the first is the default
    temperature: float | None = 4.0  # the default; None allows 1 only
    alpha: float = 1.0  # the default
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    conv_rate: float = 2e-3  # the highest learning rate of convolutions from random weights
    conv_steps: int = 0  # the fewest steps of such a training, where they take no more than 200 epochs
    augment: bool = True
    vocabulary: Literal["corpus", "whole"] = "corpus"  # the default tokens of a student made from the teacher
    teachers: frozenset[str] = frozenset({"torch", "adapter", "onnx", "stored"})
    bases: bool = False  # students can be made from another model, where the teacher has no weights to give
    ensemble: bool = True  # several teachers, or several passes of one, can be combined
    own_steps: frozenset[str] = frozenset()  # kinds of students whose steps of time are not their teacher's
    unused: Mapping[str, str] = {}  # keys of the spec without effect → the fix


OF_OUTPUTS = ("kl", "reverse-kl", "jsd", "soft-ce", "mse", "bce", "dkd", "dist")
OF_LAYERS = ("hidden", "attention", "relation")
LAYERS = frozenset({"lowest", "spread", "named"})
# Students made from a teacher: some of its layers, or another model of the same kind.
_LAYERS = LAYERS | {"model"}

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
            ("student.vocabulary", "student.embedding", "student.start"), "Remove it: it is of students that read texts"
        ),
    },
)
SPEECH = MEDIA._replace(
    students=LAYERS | {"conv", "gru"},
    instead="Take conv:96 or gru:96, or with another number of channels; or layers:6 of a Wav2Vec2 or its kin",
    default="conv:96",
    ladder=("conv:48", "conv:96", "conv:144", "conv:192"),
    losses=("ctc", "kl"),
    own_steps=frozenset({"conv", "gru"}),
    temperature=None,
    alpha=0.5,
    conv_rate=5e-3,
    conv_steps=8_000,
    unused=dict(MEDIA.unused) | {"teacher.combine": "Name one teacher"},
    ensemble=False,
)
# A recogniser that writes tokens: layers of the teacher's decoder behind its own encoder.
SEQ2SEQ = SPEECH._replace(
    students=LAYERS,
    own_steps=frozenset(),
    instead="Take spread:2, or layers:2",
    default="spread:2",
    ladder=("spread:1", "spread:2", "spread:3"),
    losses=("kl", "reverse-kl", "jsd", "soft-ce", "mse"),  # defined on a subset of the tokens
    precisions=("fp32", "int8"),
    alpha=0.55,  # as distil-whisper's training has it: 1 of divergence to 0.8 of cross-entropy
)
