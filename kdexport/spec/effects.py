"""Settings that would have no effect beside the others: each is an error, never a silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from kdexport.errors import SpecError
from kdexport.spec.sections import Distill, Spec, Weight

# What each loss reads besides the logits of both.
SOFTENED = {"kl", "reverse-kl", "jsd", "soft-ce", "bce", "dkd", "dist"}
OF_LAYERS = {"hidden", "attention", "relation"}


# Losses of logits for answers that don't exclude each other, or are numbers; the first is taken by default.
_LOSSES = {"multi-label": ("bce", "mse"), "regression": ("mse",)}


def with_defaults_of_task(tree: dict[str, Any], spec: Spec, source: str) -> Spec:
    """The spec with the defaults of its task: the loss of its problem, a language model's temperature.

    Raises:
        SpecError: it names a loss that compares labels of which one excludes the others.
    """
    if spec.task == "causal-lm" and "temperature" not in (tree.get("distill") or {}):
        # Softening is for the few classes that a sure teacher leaves at 0; of the next token it is never that sure.
        spec = msgspec.structs.replace(spec, distill=msgspec.structs.replace(spec.distill, temperature=1.0))
    if spec.data.problem == "single-label":
        return spec
    if spec.task != "text-classification":
        raise SpecError(f"{source}: data.problem has no effect on {spec.task}", "Remove it")
    allowed = _LOSSES[spec.data.problem]
    if "loss" not in (tree.get("distill") or {}):
        return msgspec.structs.replace(spec, distill=msgspec.structs.replace(spec.distill, loss=allowed[0]))
    if wrong := sorted(losses_of(spec) - {*allowed} - OF_LAYERS):
        raise SpecError(
            f"{source}: distill.loss: {wrong[0]} is not for data.problem {spec.data.problem}",
            f"Take {' or '.join(allowed)}",
        )
    return spec


def refuse_without_effect(tree: dict[str, Any], spec: Spec, source: str) -> None:
    """Refuse what the tree sets away from its default although nothing reads it.

    Raises:
        SpecError: names the first such key, why it has no effect, and what to do.
    """
    weights = weights_of(spec.distill)
    if not any(_moves_or_counts(weight) for weight in weights.values()):
        raise SpecError(f"{source}: distill.loss: every weight is 0, so the teacher teaches nothing", "Raise one")
    if set(weights) <= OF_LAYERS and spec.distill.alpha == 1:
        raise SpecError(
            f"{source}: distill.loss: {', '.join(sorted(weights))} with alpha 1 leaves the student's head untaught",
            "Add kl, or lower alpha",
        )
    for key, why, fix in _without_effect(spec):
        section, _, name = key.partition(".")
        if name in (tree.get(section) or {}) and getattr(getattr(spec, section), name) != _default(spec, section, name):
            raise SpecError(f"{source}: {key} has no effect {why}", fix)


def weights_of(distill: Distill) -> dict[str, Weight]:
    """The losses in use, with their weights."""
    loss = distill.loss
    return {loss: 1.0} if isinstance(loss, str) else {str(name): weight for name, weight in loss.items()}


def losses_of(spec: Spec) -> set[str]:
    """The names of the losses in use."""
    return set(weights_of(spec.distill))


def _without_effect(spec: Spec) -> Iterator[tuple[str, str, str]]:
    losses, distill = losses_of(spec), spec.distill
    if distill.alpha == 0:
        for name in ("temperature", "loss"):
            yield f"distill.{name}", "with alpha 0", "Raise alpha, or remove it"
    elif not losses & SOFTENED:
        yield "distill.temperature", f"on the loss {', '.join(sorted(losses))}", "Remove it, or take kl"
    if spec.task in ("image-classification", "audio-classification"):
        for key in ("data.text_pair", "data.max_length", "data.max_chars"):
            yield key, f"on {spec.task}", "Remove it: it is of texts"
        for key in ("student.vocabulary", "student.embedding", "student.start"):
            yield key, f"on {spec.task}", "Remove it: it is of students that read texts"
    if spec.task == "causal-lm":
        for key in ("data.text_pair", "data.label", "student.vocabulary", "student.embedding", "distill.augment"):
            yield key, f"on {spec.task}", "Remove it"
    elif spec.distill.samples:
        yield "distill.samples", f"on {spec.task}", "Remove it, or take augment"
    several = not isinstance(spec.teacher.model, str) and len(spec.teacher.model) > 1
    if not several:
        yield "teacher.weights", "with one teacher", "Remove it"
    if not several and spec.teacher.passes == 1:
        yield "teacher.combine", "with one teacher and one pass", "Name more teachers, or raise passes"
    if spec.teacher.passes == 1:
        yield "teacher.noise", "with one pass", "Raise teacher.passes"
    if "int8" not in spec.export.variants:
        yield "export.max_int8_loss", "without int8", "Add int8 to the variants"
    if not several_students(spec):
        yield "budget.time_limit_s", "with one student", "Name several, or none: --student tiny --student bag"


def _moves_or_counts(weight: Weight) -> bool:
    return weight > 0 if isinstance(weight, (int, float)) else max(weight.start, weight.end) > 0


def several_students(spec: Spec) -> bool:
    """Whether a search chooses the student."""
    named = spec.student.model
    return spec.budget.binds() if named is None else not isinstance(named, str) and len(named) > 1


def _default(spec: Spec, section: str, name: str) -> Any:
    kind = type(getattr(spec, section))
    at = kind.__struct_fields__.index(name) - (len(kind.__struct_fields__) - len(kind.__struct_defaults__))
    return kind.__struct_defaults__[at]
