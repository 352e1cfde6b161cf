"""Values that the spec leaves open, derived with a reason; no torch, so `--plan` is quick."""

import re
from math import ceil
from typing import NamedTuple

from kdexport.errors import SpecError, counted
from kdexport.spec.sections import Distill, Spec, Student, TeacherTraining
from kdexport.spec.teachers import config_of, origin
from kdexport.tasks import task_class
from kdexport.tasks.menus import MEDIA, Menu

# name → (layers, width); the feed-forward width is 4 × width (Turc et al. 2019).
PRESETS = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512)}
NETWORKS = ("bag", "cnn", "gru")
_CONV_WIDTH = 16
_EXAMPLES_SEEN, _STEPS = 300_000, 500
_BATCH = 32
_MOST_EPOCHS = 200
# The fewest epochs over mostly augmented texts, which are not overfitted (Beyer et al. 2022).
_PATIENT = 5
# A teacher this sure of the training rows says hardly more about them than their labels: it is asked about others.
_SURE, _MOST_VIEWS = 0.95, 120_000
# The fewest layers of a teacher of which three are a student.
_ENOUGH_LAYERS = 4
# From so many validation rows on, training stops early: the best of a few epochs on fewer is luck.
_ENOUGH = 200
# Fine-tuning sees a number of examples for the task and more for each label: docs/decisions.md.
_TEACHER_EXAMPLES, _EXAMPLES_A_LABEL, _TEACHER_STEPS = 20_000, 200, 100


class Derived(NamedTuple):
    """A value and its reason."""

    value: float
    reason: str


class Training(NamedTuple):
    """Hyper-parameters of a teacher's training, with their reasons."""

    epochs: Derived
    learning_rate: Derived
    batch_size: Derived
    patience: Derived | None


class Shape(NamedTuple):
    """A student by its name: `kind` is narrow, lowest, spread, named, network, conv or model (a folder)."""

    kind: str
    layers: int = 0
    width: int = 0
    indices: tuple[int, ...] = ()
    network: str = ""


def shape_of(model: str) -> Shape:
    """Parse the name of a student; raise SpecError where `layers:` or `spread:` has no positive number or list."""
    if model in PRESETS:
        return Shape("narrow", *PRESETS[model])
    if found := re.fullmatch(rf"({'|'.join(NETWORKS)})(?::([1-9]\d*))?", model):
        if found[1] == "bag" and found[2]:
            raise SpecError(f"student.model: {model!r}: a bag is as wide as its embeddings", "Set student.embedding")
        return Shape("network", 1, int(found[2] or 0), network=found[1])
    if found := re.fullmatch(r"conv(?::([1-9]\d*))?", model):
        return Shape("conv", 0, int(found[1] or _CONV_WIDTH))
    if found := re.fullmatch(r"([1-9]\d?)x([1-9]\d*)", model):
        return Shape("narrow", int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(layers|spread):(0*[1-9]\d*)", model):
        return Shape("lowest" if found[1] == "layers" else "spread", int(found[2]))
    if found := re.fullmatch(r"layers:(\d+(?:\+\d+)+)", model):
        indices = tuple(int(index) for index in found[1].split("+"))
        return Shape("named", len(indices), 0, indices)
    if found := re.match(r"(layers|spread):", model):
        raise SpecError(f"student.model: {model!r} names no number of layers", f"Write it like {found[1]}:3")
    return Shape("model")


def students(settings: Spec) -> tuple[str, ...]:
    """Return the students to train: one, or the ladder of a search."""
    given = settings.student.model
    if given is None:
        menu = task_class(settings.task, settings.data.problem).menu
        return menu.ladder if settings.budget.binds() else (_default(menu.default, settings),)
    return (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))


def _default(name: str, settings: Spec) -> str:
    """Return the default student; `tiny` for one of three layers where the teacher has hardly more."""
    layers = config_of(origin(settings)).get("num_hidden_layers")
    few = isinstance(layers, int) and layers < _ENOUGH_LAYERS
    return "tiny" if few and shape_of(name).kind == "spread" else name


def vocabulary(student: Student, name: str, task: str) -> str:
    """Return the tokens of a student: `whole` or `corpus`."""
    if student.vocabulary is not None:
        return student.vocabulary
    return "whole" if shape_of(name).kind == "model" else task_class(task).menu.vocabulary


def pools(student: Student, name: str) -> bool:
    """Return whether a student is one of ours, which pool over the teacher's embeddings."""
    kind = shape_of(name).kind
    return kind == "network" or (kind == "narrow" and student.embedding is not None)


def start_of(student: Student, name: str, menu: Menu = MEDIA) -> str:
    """Return a student's initialisation: `pools` (over the teacher's embeddings), `random`, or `weights`."""
    shape = shape_of(name)
    if shape.kind == "conv" or shape.network in menu.own_steps:
        return "random"
    return "pools" if pools(student, name) else "weights"


def epochs(settings: Distill, rows: int, transfer: int = 0, start: str = "weights", menu: Menu = MEDIA) -> Derived:
    """Return the epochs over training rows and transfer rows, which the teacher alone labels: docs/decisions.md."""
    if settings.epochs is not None:
        return Derived(settings.epochs, "as given")
    every, batch = rows + transfer, batch_size(settings, rows, start, menu).value
    found = f"there are {rows:,} rows" + (f" and {transfer:,} that the teacher labels" if transfer else "")
    if start == "random":
        value, seen = max(8, min(60, 2 * _EXAMPLES_SEEN // every)), f"{2 * _EXAMPLES_SEEN:,} examples seen"
        if (patient := _patient(menu, every, batch)) > value:
            return Derived(patient, f"about {menu.conv_steps:,} steps, at most {_MOST_EPOCHS} epochs; {found}")
        return Derived(value, f"about {seen} from random weights, 8 to 60 epochs; {found}")
    if 15 * every < _STEPS * batch:
        value = min(100, ceil(_STEPS * batch / every))
        return Derived(value, f"about {_STEPS} steps, at most 100 epochs; {found}")
    least = _PATIENT if transfer else 3
    most = 8 if start == "pools" else 15
    value = max(least, min(most, _EXAMPLES_SEEN // every))
    return Derived(value, f"about {_EXAMPLES_SEEN:,} examples seen, {least} to {most} epochs; {found}")


def _patient(menu: Menu, rows: int, batch: float) -> int:
    """Return the fewest epochs of a network from random weights."""
    return min(_MOST_EPOCHS, ceil(menu.conv_steps * batch / rows))


def batch_size(settings: Distill, rows: int, start: str = "weights", menu: Menu = MEDIA) -> Derived:
    """Return the rows a step."""
    if settings.batch_size is not None:
        return Derived(settings.batch_size, "as given")
    return _small_batch(rows, menu) if start == "random" and menu.conv_steps else Derived(_BATCH, "the default")


def dealt(batch: Derived, processes: int, accumulate: int, key: str) -> Derived:
    """Return the rows a step that processes and passes share evenly; raise SpecError where a given number can't be."""
    parts, value = processes * accumulate, int(batch.value)
    if value % parts == 0:
        return batch
    whom = " and ".join([
        *([counted(processes, "process", "processes")] if processes > 1 else []),
        *([counted(accumulate, "pass", "passes")] if accumulate > 1 else []),
    ])  # fmt: skip
    near = max(1, round(value / parts)) * parts
    if batch.reason == "as given":
        raise SpecError(f"{key}: {counted(value, 'row')} a step can't be dealt evenly to {whom}", f"Take {near}, say")
    return Derived(near, f"the multiple of {parts} nearest to {value}, for {whom}; {batch.reason}")


def check_dealt(settings: Spec, processes: int) -> None:
    """Raise SpecError where a batch size that is given can't be dealt evenly."""
    for key, section in {"distill": settings.distill, "teacher.train": settings.teacher.train}.items():
        if section and section.batch_size is not None:
            dealt(Derived(section.batch_size, "as given"), processes, section.accumulate, f"{key}.batch_size")


def _small_batch(rows: int, menu: Menu) -> Derived:
    why = f"8 below 2,000 rows, else 16, as {menu.conv_steps:,} steps are needed: there are {rows:,}"
    return Derived(8 if rows < 2_000 else 16, why)


def _random_rate(menu: Menu, batch: float) -> Derived:
    value = menu.conv_rate * min(1.0, batch / 16)
    return Derived(float(f"{value:.2g}"), f"{menu.conv_rate:g} from random weights, less below 16 rows a step")


def views(sure: float, rows: int) -> Derived:
    """Return the augmented copies of each text for a teacher that is so sure of its answers to train, on average."""
    reason = f"the teacher is {sure:.1%} sure of the training rows on average"
    return Derived(max(1, min(8, _MOST_VIEWS // rows)) if sure >= _SURE and rows <= _MOST_VIEWS else 0, reason)


def learning_rate(
    settings: Distill, student: Student, name: str, width: int, menu: Menu = MEDIA, batch: float = _BATCH
) -> Derived:
    """Return the highest learning rate: smaller for wider transformers, halved for trained weights."""
    if settings.learning_rate is not None:
        return Derived(settings.learning_rate, "as given")
    weights = start_of(student, name, menu)
    if weights == "pools":
        return Derived(1e-3, "1e-3 for students that pool over the teacher's embeddings")
    if weights == "random":
        return _random_rate(menu, batch)
    if not width:
        return Derived(2e-4, "2e-4 for a model that is trained already and has no one width")
    trained = shape_of(name).kind != "narrow"
    value = 5e-4 * 128 / width * (0.5 if trained else 1.0)
    start = ", halved: its weights are trained already" if trained else ""
    return Derived(float(f"{value:.2g}"), f"5e-4 at width 128, less for wider: it is {width} wide{start}")


def training(
    given: TeacherTraining, rows: int, validation: int, labels: int, width: int, *, trained: bool, menu: Menu = MEDIA
) -> Training:
    """Return how to train a teacher of this width on so many rows; `trained`: it has weights already."""
    size = Derived(32 if rows >= 2_000 else 16, f"32 from 2,000 rows on, else 16: there are {rows:,}")
    if not trained:
        size = Derived(128 if rows >= 20_000 else 32, f"128 from 20,000 rows on, else 32: there are {rows:,}")
        size = _small_batch(rows, menu) if menu.conv_steps and not width else size
    batch = _given(given.batch_size) or size
    if not trained:
        value = max(8, min(20, 2 * _EXAMPLES_SEEN // rows))
        passes = Derived(value, f"about {2 * _EXAMPLES_SEEN:,} examples from random weights, 8 to 20 epochs")
        rate = Derived(1e-3 * (batch.value / 32) ** 0.5, "1e-3 from random weights at 32 rows a step, more for more")
        if menu.conv_steps and not width:
            least = max(value, _patient(menu, rows, batch.value))
            passes = Derived(
                least, f"about {menu.conv_steps:,} steps from random weights, at most {_MOST_EPOCHS} epochs"
            )
            rate = _random_rate(menu, batch.value)
    else:
        seen = _TEACHER_EXAMPLES + _EXAMPLES_A_LABEL * labels
        value = max(3, min(8, round(seen / rows)), min(40, -(-_TEACHER_STEPS * int(batch.value) // rows)))
        passes = Derived(value, f"about {seen:,} examples (labels: {labels}), 3–8 epochs, or {_TEACHER_STEPS} steps")
        shown = f"{width} wide" if width else "of no one width"
        highest = min(5e-4, 2e-4 * (384 / width) ** 2) if width else 1e-4
        rate = Derived(float(f"{highest:.1g}"), f"2e-4 at width 384, less for wider teachers: it is {shown}")
    epochs = _given(given.epochs) or passes
    patience = _given(given.patience)
    if patience is None and given.epochs is None and validation >= _ENOUGH:
        patience = Derived(max(2, -(-int(epochs.value) // 4)), "a quarter of the epochs, at least 2")
    return Training(epochs, _given(given.learning_rate) or rate, batch, patience)


def _given(value: float | None) -> Derived | None:
    return None if value is None else Derived(value, "as given")
