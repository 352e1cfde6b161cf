"""The teachers of a spec: what kind each is, whether the rest of the spec fits it, and the stage that opens them.

The stage's folder is that of the first teacher, from which students may take weights; the second is in `1/`, and so
on. Each holds `task.json`, a tokenizer, `teacher.json` (kind and name), and

    torch      config and weights, as `save_pretrained` writes them; a PEFT adapter is merged and becomes one
    onnx       `model.onnx`; there is nothing to build a student from, and the file is what is measured
    stored     `logits/`, by content; nothing to build from or to measure

No torch here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from kdexport import spec
from kdexport.data import demo, read_summary
from kdexport.data.passages import Cut, cutter
from kdexport.data.sources import rows_of_sources
from kdexport.distill.combine import columns_of
from kdexport.errors import ModelError, SpecError
from kdexport.files import write_json
from kdexport.progress import say
from kdexport.runtime import artifact
from kdexport.spec import derive
from kdexport.spec.checks import losses_of
from kdexport.tasks import load_task, task_class
from kdexport.tasks.menus import OF_LAYERS

Kind = Literal["torch", "onnx", "stored"]

_RECORD = "teacher.json"


class _Record(msgspec.Struct, frozen=True):
    """`teacher.json`."""

    kind: Kind
    model: str


class Named(NamedTuple):
    """One teacher of a finished stage: where it is, its kind, and what the spec calls it."""

    folder: Path
    prefix: str
    kind: Kind
    model: str


# --- the spec


def models_of(settings: spec.Teacher) -> tuple[str, ...]:
    """The teachers that a spec names; the one that comes with `kdexport[demo]` by its folder."""
    named = (settings.model,) if isinstance(settings.model, str) else settings.model
    return tuple(demo.located(model) for model in named)


def check(settings: spec.Spec) -> None:
    """Refuse, before any work, what the teachers can't do.

    Raises:
        SpecError: names the setting.
        ModelError: a file of logits does not exist.
    """
    teacher, models = settings.teacher, models_of(settings.teacher)
    kinds = {model: kind_of(model) for model in models}
    if teacher.weights is not None and len(teacher.weights) != len(models):
        raise SpecError(f"teacher.weights has {len(teacher.weights)} numbers for {len(models)} teachers")
    for model, kind in kinds.items():
        if kind == "stored" and not Path(model).is_file():
            raise ModelError(f"teacher {model} does not exist", "Check the path")
        if kind != "torch" and teacher.train is not None:
            raise SpecError(f"teacher.train: {_SAID[kind]} can't be fine-tuned ({model})", "Leave teacher.train out")
        if kind != "torch" and teacher.passes > 1 and (kind == "stored" or teacher.noise == "dropout"):
            fix = "Leave teacher.passes out" if kind == "stored" else "Take teacher.noise: augment"
            raise SpecError(f"teacher.passes: {_SAID[kind]} has no dropout to read with ({model})", fix)
        if kind == "stored" and settings.distill.augment is not None:
            raise SpecError(
                f"distill.augment: {_SAID[kind]} holds no answers to changed texts ({model})", "Leave it out"
            )
    menu = task_class(settings.task, settings.data.problem).menu
    if not menu.ensemble and (len(models) > 1 or teacher.passes > 1):
        raise SpecError(f"teacher.model: for {settings.task} it is one teacher, which reads each text once", "Name one")
    for model, kind in kinds.items():
        named = "adapter" if kind == "torch" and is_adapter(Path(model)) else kind
        if named not in menu.teachers:
            raise SpecError(f"teacher.model: for {settings.task} it can't be {_SAID[named]} ({model}) yet")
    if not menu.augment and teacher.passes > 1 and teacher.noise == "augment":
        raise SpecError(f"teacher.noise: augment changes texts, not the rows of {settings.task}", "Take dropout")
    if kinds[models[0]] == "torch":
        return
    said = f"{_SAID[kinds[models[0]]]} ({models[0]})"
    for student in derive.students(settings):
        if derive.shape_of(student).kind != "model":
            raise SpecError(
                f"student.model: {student!r} is built from the teacher's weights, and {said} has none",
                "Name a Hugging Face folder or id for the student, or another teacher first",
            )
    if wants := sorted(losses_of(settings) & {*OF_LAYERS}):
        raise SpecError(f"distill.loss: {wants[0]} reads the teacher's layers, and {said} shows none", "Take kl")


_SAID = {"torch": "a model", "adapter": "an adapter", "onnx": "an ONNX file", "stored": "a file of logits"}


def kind_of(model: str) -> Kind:
    """What a named teacher is; a Hugging Face folder or hub id unless the files say otherwise."""
    path = Path(model)
    if path.suffix in (".npz", ".parquet"):
        return "stored"
    return "onnx" if _onnx_file(path) else "torch"


def files(settings: spec.Spec) -> list[Path]:
    """The local files and folders whose content decides what the teachers are: what the stage reads."""
    named = [*models_of(settings.teacher)]
    named += [base_of(Path(model)) for model in named if is_adapter(Path(model))]
    named += [student] if (student := tokenizer_for_stored(settings)) else []
    return [Path(name) for name in named if Path(name).exists()]


def settings_of(settings: spec.Spec) -> list[Any]:
    """The part of the spec that decides what the teachers are; how they are asked and combined is not of it."""
    asked = {"weights": None, "combine": "log-mean", "passes": 1, "noise": "dropout"}
    teacher = msgspec.structs.replace(settings.teacher, **asked)
    return [teacher, settings.data.max_length, settings.seed, tokenizer_for_stored(settings)]


def asked_of(settings: spec.Spec) -> list[Any]:
    """The part of the spec that decides what they are asked, and how their answers are combined."""
    teacher, distill = settings.teacher, settings.distill
    asked = [teacher.weights, teacher.combine, teacher.passes, teacher.noise, distill.augment, settings.seed]
    return [*asked, distill.samples] if distill.samples else asked


def cut_by(settings: spec.Spec) -> list[str]:
    """The teacher whose tokenizer says how long passages are, where texts are cut into them."""
    return [models_of(settings.teacher)[0]] if task_class(settings.task).cuts else []


def cut_of(settings: spec.Spec) -> Cut | None:
    """How a language model's texts are cut into passages: as long as the teacher reads, or as is asked for.

    Raises:
        ModelError: the teacher has no tokenizer, or reads less than is asked for.
    """
    for model in cut_by(settings):
        from kdexport.models.loading import open_config, open_tokenizer
        from kdexport.models.saving import read_length

        tokenizer = open_tokenizer(model)
        length = read_length(open_config(model), tokenizer, settings.data.max_length)
        return cutter(tokenizer.backend_tokenizer, length)
    return None


def tokenizer_for_stored(settings: spec.Spec) -> str | None:
    """The student whose tokenizer is taken where the first teacher is a file of logits; None where it is another."""
    return derive.students(settings)[0] if kind_of(models_of(settings.teacher)[0]) == "stored" else None


def is_adapter(folder: Path) -> bool:
    """Whether it is a PEFT adapter's."""
    return (folder / "adapter_config.json").is_file()


def base_of(adapter: Path) -> str:
    """The base model as its adapter names it: a hub id, or a folder, from here or from the adapter's own place.

    Raises:
        ModelError: the adapter names none.
    """
    try:
        named = msgspec.json.decode((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        named = None
    if not isinstance(named, str) or not named:
        raise ModelError(f"adapter {adapter} names no base model", "Set base_model_name_or_path in adapter_config.json")
    beside = adapter / named
    return str(beside) if not Path(named).exists() and beside.is_dir() else named


def _onnx_file(path: Path) -> Path | None:
    """The fp32 file of an artifact of ours, or of a folder as Optimum writes it that has no other weights."""
    folder = artifact.resolve(path)
    if (folder / artifact.MANIFEST).is_file():
        return folder / artifact.SHIPPED_AS["fp32"]
    weights = [p for kind in ("*.safetensors", "pytorch_model*.bin", "adapter_config.json") for p in path.glob(kind)]
    if weights or not (path / "config.json").is_file():
        return None
    return next((path / name for name in ("onnx/model.onnx", "model.onnx") if (path / name).is_file()), None)


# --- the stage


def prepare_teachers(settings: spec.Spec, data: Path, out: Path) -> None:
    """Write the teacher stage: every teacher that the spec names, opened, checked, fine-tuned if asked.

    What an interrupted call finished is kept. The i-th is fine-tuned with `seed + i`.

    Raises:
        ModelError: a teacher can't be used with these data, or theirs are not the labels of the first.
    """
    models = models_of(settings.teacher)
    for i, model in enumerate(models):
        folder = out / str(i) if i else out
        if (folder / _RECORD).exists():
            continue
        folder.mkdir(exist_ok=True)
        if len(models) > 1:
            say(f"teacher {i + 1} of {len(models)}: {model}")
        kind = kind_of(model)
        if kind == "torch":
            _take_torch(settings, model, data, settings.seed + i, folder)
        elif kind == "onnx":
            _take_onnx(model, data, settings.data.max_length, folder)
        else:
            _take_stored(settings, model, data, folder, out if i else None)
        write_json(folder / _RECORD, _Record(kind, model))
    first, *others = teachers_of(out)
    labels = load_task(first.folder).labels
    for other in others:
        columns_of(labels, load_task(other.folder).labels, first.model, other.model)


def teachers_of(stage: Path) -> list[Named]:
    """The teachers of a finished stage, the first one first."""
    inner = sorted((path.parent for path in stage.glob(f"*/{_RECORD}")), key=lambda folder: int(folder.name))
    found = []
    for folder in (stage, *inner):
        path = folder / _RECORD
        # Stages of before hold one Hugging Face teacher.
        record = msgspec.json.decode(path.read_bytes(), type=_Record) if path.exists() else _Record("torch", str(stage))
        found.append(Named(folder, "" if folder == stage else f"{folder.name}/", record.kind, record.model))
    return found


def kind_of_first(stage: Path) -> Kind:
    """The kind of a finished stage's first teacher, whose folder the stage's is."""
    return teachers_of(stage)[0].kind


def _take_torch(settings: spec.Spec, model: str, data: Path, seed: int, out: Path) -> None:
    from kdexport.distill.teacher import prepare_teacher

    teacher = msgspec.structs.replace(settings.teacher, model=model)
    if not is_adapter(Path(model)):
        prepare_teacher(teacher, data, settings.data.max_length, seed, out)
        return
    from kdexport.distill.adapter import merge_adapter

    merged = out / "merged"
    merged.mkdir(exist_ok=True)
    merge_adapter(Path(model), merged)
    prepare_teacher(teacher, data, settings.data.max_length, seed, out, merged)
    shutil.rmtree(merged)


def _take_onnx(model: str, data: Path, max_length: int | None, out: Path) -> None:
    """An artifact of ours, its files checked; or a folder as Optimum writes it."""
    from transformers import AutoConfig

    from kdexport.distill.teacher import match_labels
    from kdexport.models.loading import open_tokenizer, own_labels
    from kdexport.models.saving import longest_input, write_task
    from kdexport.runtime.predictor import Predictor, tensors_of
    from kdexport.tasks.classes import function_of

    folder = artifact.resolve(Path(model))
    tokenizer = open_tokenizer(str(folder))
    if (folder / artifact.MANIFEST).is_file():
        file, task = artifact.model_file(folder, "fp32"), artifact.read_manifest(folder).task
        own, function, inputs, reads, usual = task.labels, task.function, task.inputs, task.max_length, task.max_length
    else:
        found = _onnx_file(folder)
        assert found
        file, config = found, AutoConfig.from_pretrained(folder)
        own, inputs = own_labels(config), [tensor.name for tensor in tensors_of(file)[0]]
        function, reads, usual = function_of(len(own), config.problem_type), longest_input(config, tokenizer), 128
    if function != "softmax":
        raise ModelError(f"teacher {model} does not choose one label of several", "Name a single-label classifier")
    labels = match_labels(own, read_summary(data).labels, True, model, can_learn=False)
    write_task(tokenizer, inputs, reads, max_length, labels, out, at_most=usual)
    for part in file.parent.glob(f"{file.name}*"):  # weights of more than 2 GB stand beside the graph
        shutil.copyfile(part, out / part.name)
    if (folder / "config.json").is_file():
        shutil.copyfile(folder / "config.json", out / "config.json")
    Predictor(load_task(out), out / file.name)


def _take_stored(settings: spec.Spec, model: str, data: Path, out: Path, first: Path | None) -> None:
    """Its tokenizer only says what a text is to the rest of the toolkit: the first teacher's, or the student's."""
    from kdexport.distill.stored import take_stored
    from kdexport.models.loading import open_config, open_model
    from kdexport.models.saving import save_task

    labels = take_stored(Path(model), data, rows_of_sources(settings.data), settings.task, out)
    if first:
        write_json(out / "task.json", msgspec.structs.replace(load_task(first).config, labels=labels))
        shutil.copyfile(first / "tokenizer.json", out / "tokenizer.json")
        return
    student = tokenizer_for_stored(settings)
    assert student
    opened = open_model(student, open_config(student), settings.task, labels)
    save_task(opened, settings.data.max_length, labels, out, task=settings.task)
    opened.model.config.save_pretrained(out)
