"""Refuse, before any work, what the task or the teachers don't offer, and settings without an effect."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kdexport.errors import SpecError
from kdexport.spec import derive
from kdexport.spec.ask import Ask
from kdexport.spec.sections import Distill, Spec, Weight
from kdexport.spec.teachers import (
    ASKED,
    LABELLING,
    OPEN,
    TRANSCRIBER,
    address_of,
    config_of,
    is_adapter,
    kind_of,
    named,
)
from kdexport.tasks import names, task_class
from kdexport.tasks.inputs.languages import codes_of, known_language
from kdexport.tasks.menus import LAYERS, OF_LAYERS, Menu

# Losses that read probabilities softened by the temperature.
_SOFTENED = {"kl", "reverse-kl", "jsd", "soft-ce", "bce", "dkd", "dist", "similarity", "listwise-kl"}
_TEACHERS = {
    "torch": "a model", "adapter": "an adapter", "onnx": "an ONNX file", "stored": "a file of logits",
    "zero-shot": "a zero-shot model", "endpoint": "an endpoint", "answers": "a file of answers",
}  # fmt: skip


def checked(tree: dict[str, Any], spec: Spec) -> Spec:
    """Return the spec with the defaults of its task; `tree` is as given, without defaults."""
    spec = _of_decoder(spec)
    menu = _menu(spec)
    defaults: dict[str, Any] = {
        "loss": menu.losses[0], "temperature": menu.temperature or 1.0, "alpha": menu.alpha
    }  # fmt: skip
    if losses_of(spec) <= {*OF_LAYERS} and "loss" in (tree.get("distill") or {}):
        defaults["alpha"] = 0.9  # nothing else teaches the head
    in_use = losses_of(spec) if "loss" in (tree.get("distill") or {}) else {menu.losses[0]}
    if not in_use & _SOFTENED and menu.temperature is not None:  # it has no effect
        defaults["temperature"] = _default(spec, "distill", "temperature")
    distill = {name: value for name, value in defaults.items() if name not in (tree.get("distill") or {})}
    spec = msgspec.structs.replace(spec, distill=msgspec.structs.replace(spec.distill, **distill))
    _check_menu(spec, menu)
    _check_students(spec, menu)
    _check_losses(spec)
    spec = _of_asked(spec, menu)
    _check_teachers(spec, menu)
    _check_transcriber(spec)
    for key, why, fix in _without_effect(spec, menu):
        section, _, name = key.partition(".")
        if name in (tree.get(section) or {}) and getattr(getattr(spec, section), name) != _default(spec, section, name):
            raise SpecError(f"{key} has no effect {why}", fix)
    return spec


def weights_of(distill: Distill) -> dict[str, Weight]:
    """Return the losses in use, with their weights."""
    loss = distill.loss
    return {loss: 1.0} if isinstance(loss, str) else {str(name): weight for name, weight in loss.items()}


def losses_of(spec: Spec) -> set[str]:
    """Return the names of the losses in use."""
    return set(weights_of(spec.distill))


def _menu(spec: Spec) -> Menu:
    if spec.task not in names():
        raise SpecError(f"task: {spec.task!r} is none of {', '.join(names())}")
    problems = task_class(spec.task).kinds()
    if spec.data.problem not in problems:
        raise SpecError(f"data.problem has no effect on {spec.task}", "Remove it")
    return problems[spec.data.problem].menu


def _of_decoder(spec: Spec) -> Spec:
    """Return the spec with `data.problem` seq2seq, where layers of a decoder that writes are asked for."""
    chosen = spec.student.model or ()
    shapes = [derive.shape_of(name) for name in ((chosen,) if isinstance(chosen, str) else chosen)]
    layers = shapes and {shape.kind for shape in shapes} <= LAYERS
    teacher = named(spec)[0]
    config = config_of(teacher)
    family = config.get("model_type")  # of a hub's model its name tells it
    writes = family == TRANSCRIBER if Path(teacher).exists() else TRANSCRIBER in teacher.lower()
    if spec.data.problem == "seq2seq" and not writes:
        raise SpecError(f"data.problem: seq2seq needs a teacher that writes, and {teacher} is no Whisper", "Remove it")
    if not (layers and writes) or spec.task not in names() or "seq2seq" not in task_class(spec.task).kinds():
        return spec
    _check_layers(shapes, config.get("decoder_layers"), "the teacher's decoder")
    return msgspec.structs.replace(spec, data=msgspec.structs.replace(spec.data, problem="seq2seq"))


def _check_layers(shapes: Iterable[derive.Shape], most: object, whose: str) -> None:
    wanted = max((max(shape.indices, default=shape.layers - 1) for shape in shapes if shape.kind in LAYERS), default=0)
    if isinstance(most, int) and wanted >= most:
        raise SpecError(f"student.model: {whose} has {most} layers, not {wanted + 1}", "Ask for fewer")


def _check_menu(spec: Spec, menu: Menu) -> None:
    task = _named(spec)
    if wrong := sorted(losses_of(spec) - {*menu.losses}):
        offered = [name for name in menu.losses if name not in OF_LAYERS]
        raise SpecError(f"distill.loss: {wrong[0]} is not for {task}", f"Take {_either(offered)}")
    if menu.temperature is None and spec.distill.temperature != 1:
        raise SpecError(f"distill.temperature: soft targets of {task} are those of 1", "Remove it")
    if task_class(spec.task).labels_judge and spec.distill.alpha != 1:
        raise SpecError(f"distill.alpha: no label teaches {spec.task}, so it is 1", "Remove it")
    if spec.distill.augment and not menu.augment:
        raise SpecError(f"distill.augment changes texts, and not the rows of {task}", "Leave it out")
    if wrong := [precision for precision in spec.export.variants if precision not in menu.precisions]:
        raise SpecError(f"export.variants: {wrong[0]} is none for {task}", f"Take {_either(menu.precisions)}")


def _check_students(spec: Spec, menu: Menu) -> None:
    student, chosen = spec.student, derive.students(spec)
    shapes = {name: derive.shape_of(name) for name in chosen}
    for name, shape in shapes.items():
        kinds = {shape.kind, shape.network}
        if not kinds & menu.students:
            raise SpecError(f"student.model: {name!r} is none for {spec.task}", menu.instead)
        if kinds & menu.own_steps and (wrong := sorted(losses_of(spec) - {menu.losses[0]})):
            unlike = f"compares step by step, and {name} has other steps of time than its teacher"
            raise SpecError(f"distill.loss: {wrong[0]} {unlike}", f"Take {menu.losses[0]}")
        if shape.network in menu.own_steps and shape.width == 1:
            raise SpecError(f"student.model: {name!r} has no channel for each of two directions", "Take two or more")
    if menu.own_steps and (config := config_of(named(spec)[0])):
        layered = [name for name, shape in shapes.items() if shape.kind in LAYERS]
        if layered and "conv_stride" not in config:
            strange = "with a teacher that is no Wav2Vec2 or of its kin"
            raise SpecError(f"student.model: {layered[0]!r} is none for {spec.task} {strange}", menu.instead)
        _check_layers(shapes.values(), config.get("num_hidden_layers"), "the teacher")
    pooled = [name for name in chosen if derive.start_of(student, name, menu) in ("pools", "random")]
    if pooled and (wants := sorted(losses_of(spec) & {*OF_LAYERS})) and spec.distill.alpha != 0:
        fix = "Name other students, or take losses of logits: kl, mse, dkd, dist"
        what = f"{wants[0]} matches layers, and {pooled[0]} has none that are like the teacher's"
        raise SpecError(f"distill.loss: {what}", fix)
    if student.embedding and not any(shape.kind in ("network", "narrow") for shape in shapes.values()):
        raise SpecError("student.embedding has no effect: these students have their own", "Remove it")
    narrow = any(shape.kind == "narrow" for shape in shapes.values()) and not student.embedding
    if student.start == "embeddings" and not narrow:
        raise SpecError("student.start has no effect: no student is a narrower teacher", "Remove it")


def _check_losses(spec: Spec) -> None:
    weights = weights_of(spec.distill)
    sizes = (w if isinstance(w, (int, float)) else max(w.start, w.end) for w in weights.values())
    if not any(sizes):
        raise SpecError("distill.loss: every weight is 0, so the teacher teaches nothing", "Raise one")
    if set(weights) <= {*OF_LAYERS} and spec.distill.alpha == 1:
        what = f"{', '.join(sorted(weights))} with alpha 1 leaves the student's head untaught"
        raise SpecError(f"distill.loss: {what}", "Add kl, or lower alpha")


def _check_teachers(spec: Spec, menu: Menu) -> None:
    teacher, models = spec.teacher, named(spec)
    kinds = {model: kind_of(model) for model in models}
    first = kinds[models[0]]
    if len(models) > 1 and teacher.weights is not None and len(teacher.weights) != len(models):
        raise SpecError(
            f"teacher.weights: {len(teacher.weights)} numbers for {len(models)} teachers", "Give one for each"
        )
    if not menu.ensemble and (len(models) > 1 or teacher.passes > 1):
        raise SpecError(f"teacher.model: {spec.task} takes one teacher, which reads each text once", "Name one")
    if not menu.augment and teacher.passes > 1 and teacher.noise == "augment":
        raise SpecError(f"teacher.noise: augment changes texts, not the rows of {spec.task}", "Take dropout")
    if "{}" not in teacher.hypothesis:
        raise SpecError(f"teacher.hypothesis: {teacher.hypothesis!r} has no {{}} for the label", "Add {}")
    if spec.student.base and kind_of(spec.student.base) != "torch":
        raise SpecError(f"student.base: {spec.student.base} is no model of PyTorch", "Name its folder or hub id")
    for model, kind in kinds.items():
        exact = "adapter" if kind == "torch" and is_adapter(Path(model)) else kind
        what = f"{_TEACHERS[exact]} ({model})"
        if exact not in menu.teachers:
            raise SpecError(
                f"teacher.model: for {spec.task} it can't be {what} yet", "Name a Hugging Face folder or id"
            )
        if kind != "torch" and teacher.train is not None:
            raise SpecError(f"teacher.train: {what} can't be fine-tuned", "Leave teacher.train out")
        some = kind in ("stored", *ASKED)  # it answers some texts only
        if kind != "torch" and teacher.passes > 1 and (some or teacher.noise == "dropout"):
            fix = "Leave teacher.passes out" if some else "Take teacher.noise: augment"
            raise SpecError(f"teacher.passes: {what} has no dropout to read with", fix)
        if some and spec.distill.augment is not None:
            raise SpecError(f"distill.augment: {what} holds no answers to changed texts", "Leave it out")
    if first == "torch":
        return
    for name in ("pooling",) if first == "zero-shot" else ("dtype", "devices", "pooling"):
        if getattr(teacher, name) != _default(spec, "teacher", name):
            raise SpecError(f"teacher.{name} has no effect: {models[0]} is no model of PyTorch", "Remove it")
    what = f"{_TEACHERS[first]} ({models[0]})"
    based = menu.bases and first not in OPEN
    for student in derive.students(spec):
        if derive.shape_of(student).kind != "model" and not based:
            fix = "Name a Hugging Face folder or id for the student, or another teacher first"
            raise SpecError(f"student.model: {student!r} is built from the teacher's weights, and {what} has none", fix)
    if layers := sorted(losses_of(spec) & {*OF_LAYERS}):
        raise SpecError(f"distill.loss: {layers[0]} reads the teacher's layers, and {what} shows none", "Take kl")


def _of_asked(spec: Spec, menu: Menu) -> Spec:
    """Return the spec with the defaults of a teacher that is asked; refuse labels and teachers that don't fit."""
    models = named(spec)
    kinds = {kind_of(model) for model in models}
    names_labels = "endpoint" in menu.teachers
    if spec.data.labels and not names_labels:
        raise SpecError(
            f"data.labels has no effect on {_named(spec)}", "Remove it, or name text-classification: --task"
        )
    if twice := [label for label, count in Counter([*(spec.data.labels or ())]).items() if count > 1]:
        raise SpecError(f"data.labels: {twice[0]!r} stands there twice", "Name each label once")
    if kinds & {*LABELLING} and not names_labels:
        raise SpecError(
            f"teacher.model: {models[0]} labels texts, and can't teach {_named(spec)}",
            "Take --task text-classification",
        )
    if kinds & {*ASKED} and len(models) > 1:
        raise SpecError("teacher.model: a teacher that answers some texts only has no others beside it", "Name one")
    for model in models:
        if kind_of(model) == "endpoint":
            address_of(model)
    if kind_of(models[0]) != "endpoint":
        return spec
    how = spec.teacher.ask or Ask()
    if not re.fullmatch(
        "[A-Z_][A-Z0-9_]*", how.key
    ):  # and not the key itself, which would be written to the run's folder
        raise SpecError(
            "teacher.ask.key names no environment variable", "Put the key into a variable, and write its NAME here"
        )
    if how.by not in (None, "samples") and how.samples != Ask().samples:
        raise SpecError(f"teacher.ask.samples has no effect where by is {how.by}", "Remove it, or take by: samples")
    return msgspec.structs.replace(spec, teacher=msgspec.structs.replace(spec.teacher, ask=how))


def _named(spec: Spec) -> str:
    """Return the task, or its problem where that differs."""
    return spec.task if spec.data.problem == "single-label" else f"data.problem {spec.data.problem}"


def _check_transcriber(spec: Spec) -> None:
    """Refuse, as far as the teacher's files tell, settings of a Whisper for another, and a language that it lacks."""
    teacher, asked = named(spec)[0], spec.data.language
    config, rules = config_of(teacher), config_of(teacher, "generation_config.json")
    if not config or not task_class(spec.task).transcribes:
        return
    check_whisper(spec, config.get("model_type"))
    if asked:
        known_language(asked, f"teacher {teacher}", codes_of(rules, config.get("vocab_size", 0)))


def check_whisper(spec: Spec, family: str | None) -> None:
    """Refuse settings that only a Whisper reads for a teacher of another family."""
    for key in ("language", "sentences"):
        if getattr(spec.data, key) and family != TRANSCRIBER:
            raise SpecError(f"data.{key} has no effect: teacher {named(spec)[0]} is no Whisper", "Remove it")


def _without_effect(spec: Spec, menu: Menu) -> Iterator[tuple[str, str, str]]:
    losses = losses_of(spec)
    if spec.distill.alpha == 0:
        for name in ("temperature", "loss"):
            yield f"distill.{name}", "with alpha 0", "Raise alpha, or remove it"
    elif menu.temperature is not None and not losses & _SOFTENED:
        yield "distill.temperature", f"on the loss {', '.join(sorted(losses))}", "Remove it, or take kl"
    for key, fix in menu.unused.items():
        yield key, f"on {spec.task}", fix
    if task_class(spec.task).modality == "text":
        yield "data.cache_mb", f"on {spec.task}", "Remove it: it is of images and sound"
    if not task_class(spec.task).together:
        yield "data.candidates", f"on {spec.task}", "Remove it: it is of rankings"
    if not task_class(spec.task).transcribes:
        for key in ("data.sentences", "data.words", "data.language", "distill.max_word_error"):
            yield key, f"on {spec.task}", "Remove it: it is of speech"
    if not task_class(spec.task).embeds:
        for key in ("student.dimensions", "teacher.pooling"):
            yield key, f"on {spec.task}", "Remove it: it is of sentence-embedding"
    if spec.data.problem == "seq2seq":
        yield "data.words", "on texts that are written token by token", "Remove it, or take a conv"
    else:
        yield "student.seconds", f"on {spec.task}", "Remove it: it is of a smaller Whisper"
        if spec.distill.alpha == 0:
            yield "distill.max_word_error", "with alpha 0", "Raise alpha, or remove it"
    kinds = {kind_of(model) for model in named(spec)}
    if "zero-shot" not in kinds:
        yield "teacher.hypothesis", "without a teacher zero-shot:MODEL", "Remove it"
    first = named(spec)[0]
    if not menu.bases or kind_of(first) in OPEN:
        yield "student.base", f"where students are made from {first}", "Remove it"
    elif all(derive.shape_of(name).kind == "model" for name in derive.students(spec)):
        yield "student.base", "on students that are models of their own", "Remove it"
    if "zero-shot" not in menu.teachers:
        yield "teacher.corrections", f"on {spec.task}: they are of labels with names", "Remove it"
    if len(named(spec)) == 1:
        yield "teacher.weights", "with one teacher", "Remove it"
        if spec.teacher.passes == 1:
            yield "teacher.combine", "with one teacher and one pass", "Name more teachers, or raise passes"
    if kind_of(named(spec)[0]) != "endpoint":
        yield "teacher.ask", "on a teacher that is no endpoint", "Remove it (--max-calls, --max-tokens)"
    if spec.teacher.passes == 1:
        yield "teacher.noise", "with one pass", "Raise teacher.passes"
    if "int8" not in spec.export.variants:
        yield "export.max_int8_loss", "without int8", "Add int8 to the variants"
    if len(derive.students(spec)) == 1:
        yield "budget.time_limit_s", "with one student", "Name several, or none: --student tiny --student bag"


def _either(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else str(last)


def _default(spec: Spec, section: str, name: str) -> Any:
    return next(field.default for field in msgspec.structs.fields(getattr(spec, section)) if field.name == name)
