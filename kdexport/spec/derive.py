"""Values that the spec leaves open, derived with a reason; no torch, so `--plan` costs nothing."""

from __future__ import annotations

import re
from typing import NamedTuple

from kdexport import spec
from kdexport.errors import SpecError
from kdexport.spec.effects import OF_LAYERS

# name → (layers, width); the feed-forward width is 4 × width (Turc et al. 2019).
PRESETS = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512)}
NETWORKS = ("bag", "cnn", "gru")
# Channels of the first map of a convolutional student of images or sound.
_CONV_WIDTH = 16
# What a search climbs when no student is named, from the smallest on.
LADDER = ("bag", "cnn", "tiny", "2x256", "layers:1", "layers:2")
_MEDIA_LADDER = ("conv:8", "conv", "conv:24", "conv:32")
_LANGUAGE_LADDER = ("2x128", "2x256", "layers:1", "layers:2")
_MEDIA = ("image-classification", "audio-classification")

_EXAMPLES_SEEN, _STEPS = 300_000, 500
# Passes at least over rows that are mostly changed copies: they don't overfit, so patience pays (Beyer et al. 2022).
_PATIENT = 5


class Derived(NamedTuple):
    """A value and why it is that."""

    value: float
    reason: str


class Shape(NamedTuple):
    """What `student.model` names: `kind` is narrow, lowest, spread, named, network, conv or model (a folder)."""

    kind: str
    layers: int = 0
    width: int = 0
    indices: tuple[int, ...] = ()
    network: str = ""


def shape_of(model: str) -> Shape:
    """Read the name of a student.

    Raises:
        SpecError: what follows `layers:` or `spread:` is no positive number, and no list like 0+2+5.
    """
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
    kind, colon, rest = model.partition(":")
    if not colon or kind not in ("layers", "spread"):
        return Shape("model")
    parts = rest.split("+")
    if not all(part.isdecimal() for part in parts):
        raise SpecError(f"student.model: {model!r} names no number of layers", "Write it like layers:3")
    numbers = tuple(int(part) for part in parts)
    if len(numbers) > 1 and kind == "layers":
        return Shape("named", len(numbers), 0, numbers)
    if numbers[0] == 0 or len(numbers) > 1:
        raise SpecError(f"student.model: {model!r} names no number of layers", f"Write it like {kind}:3")
    return Shape("lowest" if kind == "layers" else "spread", numbers[0])


def students(settings: spec.Spec) -> tuple[str, ...]:
    """The students to train: one, or the ladder that a search climbs."""
    named = settings.student.model
    if named is None:
        language = settings.task == "causal-lm"
        ladder, one = (_LANGUAGE_LADDER, "tiny") if language else (LADDER, "tiny")
        if settings.task in _MEDIA:
            ladder, one = _MEDIA_LADDER, "conv"
        return ladder if settings.budget.binds() else (one,)
    return (named,) if isinstance(named, str) else tuple(dict.fromkeys(named))


def check(settings: spec.Spec) -> None:
    """Refuse, before any work, names of students that can't be read and settings that none of them has.

    Raises:
        SpecError: names the setting.
    """
    if settings.distill.augment and settings.task in _MEDIA:
        raise SpecError(f"distill.augment changes texts, and not the rows of {settings.task}", "Leave it out")
    student, shapes = settings.student, [shape_of(name) for name in students(settings)]
    refused, instead = {"conv"}, "Take tiny, bag, cnn or layers:2"
    if settings.task == "causal-lm":
        refused, instead = {"conv", "network"}, "Take tiny, 4x192 or layers:2"
    elif settings.task in _MEDIA:
        refused, instead = {"narrow", "network"}, "Take conv, conv:32 or layers:2"
    for name in students(settings):
        if shape_of(name).kind in refused:
            raise SpecError(f"student.model: {name!r} is none for {settings.task}", instead)
    if "int4" in settings.export.variants and settings.task != "causal-lm":
        raise SpecError(f"export.variants: int4 is for causal-lm, and none for {settings.task}", "Take int8")
    if settings.task == "causal-lm" and (wants := sorted(spec.losses_of(settings) & OF_LAYERS)):
        raise SpecError(f"distill.loss: {wants[0]} is none for causal-lm yet", "Take kl, reverse-kl or jsd")
    pooled = [name for name in students(settings) if start_of(student, name) in ("pools", "random")]
    if pooled and (wants := sorted(spec.losses_of(settings) & OF_LAYERS)) and settings.distill.alpha != 0:
        raise SpecError(
            f"distill.loss: {wants[0]} matches layers, and {pooled[0]} has none that are like the teacher's",
            "Name other students, or take losses of logits: kl, mse, dkd, dist",
        )
    if student.embedding and not any(shape.kind in ("network", "narrow") for shape in shapes):
        raise SpecError("student.embedding has no effect on students with embeddings of their own", "Remove it")
    narrow = any(shape.kind == "narrow" for shape in shapes) and not student.embedding
    if student.start == "embeddings" and not narrow:
        raise SpecError("student.start has no effect: no student here is a narrower one of its family", "Remove it")


def vocabulary(student: spec.Student, name: str, task: str) -> str:
    """The tokens that a student keeps: `whole` or `corpus`.

    Names are mostly words that no training text has: on WNUT 17 the teacher itself, with the training texts' tokens
    alone, falls from 55.9 to 46.0 on validation.
    """
    if student.vocabulary is not None:
        return student.vocabulary
    names_or_writes = task in ("token-classification", "causal-lm")
    return "whole" if shape_of(name).kind == "model" or names_or_writes else "corpus"


def why(settings: spec.Spec) -> str:
    """Why these students, when none is named."""
    return "there is a budget: the ladder that is searched" if settings.budget.binds() else "there is no budget"


def pools(student: spec.Student, name: str) -> bool:
    """Whether a student is one of ours, which pool over the teacher's embeddings."""
    kind = shape_of(name).kind
    return kind == "network" or (kind == "narrow" and student.embedding is not None)


def start_of(student: spec.Student, name: str) -> str:
    """What a student starts from: `pools` over the teacher's embeddings, `random` weights, or else `weights`."""
    return "random" if shape_of(name).kind == "conv" else "pools" if pools(student, name) else "weights"


def epochs(settings: spec.Distill, rows: int, transfer: int = 0, start: str = "weights") -> Derived:
    """Passes over the training rows, and over the transfer rows, which the teacher alone labels.

    Convolutions start from nothing, so they see twice as many examples, and few ones more often.
    Students that pool start with all that the teacher's embeddings know and soon learn rows by heart, so they get
    fewer passes: on clinc150 a convolution kept 97.2 % of the teacher on validation after 8, and 96.5 % after 15.
    """
    if settings.epochs is not None:
        return Derived(settings.epochs, "as given")
    every = rows + transfer
    told = f"there are {rows:,} rows" + (f" and {transfer:,} that the teacher labels" if transfer else "")
    if start == "random":
        value = max(8, min(60, 2 * _EXAMPLES_SEEN // every))
        return Derived(value, f"about {2 * _EXAMPLES_SEEN:,} examples seen from random weights, 8 to 60 passes; {told}")
    if 15 * every < _STEPS * settings.batch_size:
        value = min(100, -(-_STEPS * settings.batch_size // every))
        return Derived(value, f"about {_STEPS} steps, at most 100 passes; {told}")
    least = _PATIENT if transfer else 3
    most = 8 if start == "pools" else 15
    value = max(least, min(most, _EXAMPLES_SEEN // every))
    return Derived(value, f"about {_EXAMPLES_SEEN:,} examples seen, {least} to {most} passes; {told}")


def learning_rate(settings: spec.Distill, student: spec.Student, name: str, width: int) -> Derived:
    """The highest learning rate: smaller for wider transformers, halved for weights that are trained already."""
    if settings.learning_rate is not None:
        return Derived(settings.learning_rate, "as given")
    if pools(student, name):
        return Derived(1e-3, "1e-3 for students that pool over the teacher's embeddings")
    if shape_of(name).kind == "conv":
        return Derived(2e-3, "2e-3 for convolutions with batch norms, from random weights")
    if not width:
        return Derived(2e-4, "2e-4 for a model that is trained already and has no one width")
    trained = shape_of(name).kind != "narrow"
    value = 5e-4 * 128 / width * (0.5 if trained else 1.0)
    start = ", halved: its weights are trained already" if trained else ""
    return Derived(float(f"{value:.2g}"), f"5e-4 at width 128, less for wider: it is {width} wide{start}")
