"""The teacher stage: every teacher of a spec, opened, checked, and fine-tuned if asked.

The stage's folder is that of the first teacher, from which students may take weights; the second is in `1/`, and so
on. Each holds `task.json`, a tokenizer, `teacher.json` (kind and name), and

    torch      config and weights, as `save_pretrained` writes them; PEFT adapters are merged
    onnx       `model.onnx`, which is measured; there is nothing to build a student from
    stored     `logits/`, by content; nothing to measure
    zero-shot  `nli/`, a model of natural language inference with its hypotheses; it is not measured

Where the last two come first, students are made from another model, `student.base`, which stands beside them.
"""

import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kdexport import spec
from kdexport.data import Transcribe, demo, hub, read_summary
from kdexport.data.corrections import read_corrections
from kdexport.data.passages import Cut, cutter
from kdexport.data.sources import rows_of_sources
from kdexport.distill.combine import columns_of
from kdexport.errors import ModelError, SpecError
from kdexport.files import write_json
from kdexport.progress import say
from kdexport.runtime import artifact
from kdexport.spec import derive
from kdexport.spec.checks import check_whisper
from kdexport.spec.teachers import (
    ASKED,
    OPEN,
    ZERO_SHOT,
    Kind,
    base_of,
    config_of,
    has_weights,
    is_adapter,
    kind_of,
    named,
    optimum_file,
    origin,
)  # fmt: skip
from kdexport.tasks import DEFAULT, load_task, task_class
from kdexport.tasks.config import TaskConfig, TextSide

_RECORD = "teacher.json"
EMBEDDER = "embedder"  # within the folder of a teacher of rankings that embeds texts


class TeacherFolder(NamedTuple):
    """One teacher of a finished stage: its folder, kind, and name in the spec."""

    folder: Path
    prefix: str
    kind: Kind
    model: str


# --- the spec


def models_of(settings: spec.Spec) -> tuple[str, ...]:
    """Return the teachers that a spec names; the one that comes with `kdexport[demo]` by its folder."""
    return tuple(demo.located(model) for model in named(settings))


def files(settings: spec.Spec) -> list[Path]:
    """Return the local files that the teacher stage reads; raise ModelError if a file of logits is missing."""
    models = [*models_of(settings)]
    for model in models:
        if kind_of(model) == "stored" and not Path(model).is_file():
            raise ModelError(f"teacher {model} does not exist", "Check the path")
    models += [base_of(Path(model)) for model in models if is_adapter(Path(model))]
    models = [demo.located(model.removeprefix(ZERO_SHOT)) for model in models]
    models += [base] if (base := base_for_students(settings)) else []
    return [Path(model) for model in models if Path(model).exists()]


def check(settings: spec.Spec) -> None:
    """Raise ModelError if a teacher, or a student that is another model, can't be opened."""
    if settings.teacher.dtype == "int8":
        _check_int8()
    students = [name for name in derive.students(settings) if derive.shape_of(name).kind == "model"]
    for model in (*models_of(settings), *students):
        if kind_of(model) in ("torch", "zero-shot"):
            model = demo.located(model.removeprefix(ZERO_SHOT))
            hub.check_model(base_of(Path(model)) if is_adapter(Path(model)) else model)
    if base := base_for_students(settings):
        try:
            hub.check_model(base)
        except ModelError as error:
            fix = "Install kdexport[demo], or name a folder" if not settings.student.base else error.fix
            raise ModelError(f"student.base: {error.what}", fix) from None
    for path in corrections_of(settings):
        read_corrections(path, settings)


def _check_int8() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SpecError("teacher.dtype: int8 needs a CUDA device, and there is none here", "Take bfloat16")
    if find_spec("bitsandbytes") is None:
        raise SpecError("teacher.dtype: int8 needs bitsandbytes", "pip install bitsandbytes, or take bfloat16")


def settings_of(settings: spec.Spec) -> list[Any]:
    """Return the part of the spec that the teacher stage depends on."""
    asked = {"weights": None, "combine": "log-mean", "passes": 1, "noise": "dropout"}
    teacher = spec.of_results(settings.teacher) | asked
    for name in ("dtype", "ask", "corrections", "hypothesis"):
        del teacher[name]
    kinds, more = {kind_of(model) for model in named(settings)}, list[Any]()
    if "stored" in kinds:
        more.append(2)  # the format of logits
    if "zero-shot" in kinds:
        more += [settings.teacher.hypothesis, settings.data.labels]
    base = base_for_students(settings)
    return [teacher, settings.data.max_length, settings.seed, base, *more, *(["base"] if gives_base(settings) else [])]


def asked_of(settings: spec.Spec) -> list[Any]:
    """Return the part of the spec that the soft targets depend on."""
    teacher, distill = settings.teacher, settings.distill
    asked = [teacher.weights, teacher.combine, teacher.passes, teacher.noise, distill.augment, settings.seed]
    dtype = None if teacher.dtype == "float32" else teacher.dtype
    further = (distill.samples, distill.max_word_error, dtype, teacher.corrections)
    return [*asked, *(more for more in further if more is not None)]


def corrections_of(settings: spec.Spec) -> list[Path]:
    """Return the file of a person's answers, if there is one; raise DataError if it does not exist."""
    return [Path(settings.teacher.corrections)] if settings.teacher.corrections else []


def cut_by(settings: spec.Spec) -> list[str]:
    """Return the teacher whose tokenizer and length passages depend on, where texts are cut into them."""
    return [models_of(settings)[0]] if task_class(settings.task).cuts else []


def cut_of(settings: spec.Spec) -> Cut | None:
    """Return how texts are cut into passages; raise ModelError if the teacher reads less than is asked for."""
    for model in cut_by(settings):
        from kdexport.models.loading import open_config, open_tokenizer
        from kdexport.models.registry import outline
        from kdexport.models.saving import read_length

        tokenizer = open_tokenizer(model)
        length = read_length(outline(open_config(model), settings.task), tokenizer, settings.data.max_length)
        return cutter(tokenizer.backend_tokenizer, length)
    return None


def read_by(settings: spec.Spec) -> list[str]:
    """Return the teacher that the data stage depends on, if any: it cuts texts, or transcribes recordings."""
    return [*cut_by(settings), *transcribed_by(settings)]


def transcribed_by(settings: spec.Spec) -> list[str]:
    """Return the teacher that transcribes recordings without a transcript, if it is one that can."""
    first = models_of(settings)[0]
    if not task_class(settings.task).transcribes:
        return []
    if not (family := config_of(first).get("model_type")):
        from kdexport.models.loading import open_config

        family = open_config(first).model_type
    return [first] if family == spec.teachers.TRANSCRIBER else []


def transcriber_of(settings: spec.Spec) -> Transcribe | None:
    """Return the function that transcribes by the teacher, if that is a Whisper; refuse settings of one for others."""
    for model in transcribed_by(settings):
        from kdexport.distill.transcripts import transcribe

        return partial(transcribe, task=settings.task, model=model, settings=settings.data)
    check_whisper(settings, None)
    return None


def gives_base(settings: spec.Spec) -> bool:
    """Return whether students are made from the weights of another model than the first teacher."""
    return kind_of(named(settings)[0]) not in OPEN and any(
        derive.shape_of(name).kind != "model" for name in derive.students(settings)
    )


def base_for_students(settings: spec.Spec) -> str | None:
    """Return the model whose tokenizer, at least, is used where the first teacher has none to give, else None."""
    if kind_of(named(settings)[0]) in OPEN:
        return None
    return demo.located(origin(settings)) if gives_base(settings) else derive.students(settings)[0]


def training_of(settings: spec.Spec, rows: int, validation: int, labels: int) -> derive.Training | None:
    """Return how the first teacher will be trained, as far as its files tell; None where it is not, or can't be."""
    model = models_of(settings)[0]
    if kind_of(model) != "torch" or not rows:
        return None
    config, kind = config_of(model), task_class(settings.task, settings.data.problem)
    embeds = kind.together and settings.teacher.train is None and (Path(model) / "modules.json").is_file()
    if transcribed_by(settings) or embeds:
        return None
    headless = kind.has_labels and not any(
        head in name for name in config.get("architectures") or [] for head in kind.heads
    )
    if settings.teacher.train is None and (not config or (has_weights(model) and not headless)):
        return None
    width = next((config[name] for name in ("hidden_size", "d_model", "n_embd", "dim") if name in config), 0)
    given = settings.teacher.train or spec.TeacherTraining()
    return derive.training(given, rows, validation, labels, width, trained=has_weights(model), menu=kind.menu)


# --- the stage


def prepare_teachers(settings: spec.Spec, data: Path, out: Path) -> None:
    """Write the teacher stage, except teachers that an interrupted call finished; the i-th has `seed + i`.

    Raises:
        ModelError: a teacher can't be used with these data, or labels differ from the first's.
    """
    models = models_of(settings)
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
        elif kind == "zero-shot":
            from kdexport.distill.zero_shot import take_zero_shot

            _stand_in(settings, take_zero_shot(settings, model, data, folder), data, folder, out if i else None)
        elif kind in ASKED:
            _take_asked(settings, model, data, folder)
        else:
            _take_stored(settings, model, data, folder, out if i else None)
        write_json(folder / _RECORD, {"kind": "stored" if kind in ASKED else kind, "model": model})
    first, *others = teachers_of(out)
    tasks = [load_task(folder) for folder, *_ in (first, *others)]
    for other, task in zip(others, tasks[1:], strict=True):
        columns_of(tasks[0].labels, task.labels, first.model, other.model)
    if (asked := settings.student.dimensions) and asked > (there := sum(task.answer_shape[0] for task in tasks)):
        raise ModelError(f"student.dimensions is {asked}, the teacher's vectors have {there}", "Lower it")


def teachers_of(stage: Path) -> list[TeacherFolder]:
    """Return the teachers of a finished stage in order."""
    inner = sorted((path.parent for path in stage.glob(f"*/{_RECORD}")), key=lambda folder: int(folder.name))
    found = []
    for folder in (stage, *inner):
        path, prefix = folder / _RECORD, "" if folder == stage else f"{folder.name}/"
        # Stages of before hold one Hugging Face teacher.
        record = msgspec.json.decode(path.read_bytes()) if path.exists() else {"kind": "torch", "model": str(stage)}
        found.append(TeacherFolder(folder, prefix, **record))
    return found


def kind_of_first(stage: Path) -> Kind:
    """Return the kind of a finished stage's first teacher."""
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
    """Take an artifact of ours, after checking its files, or a folder as Optimum writes it."""
    from transformers import AutoConfig

    from kdexport.distill.teacher import match_labels, some_rows, warn_of
    from kdexport.models.loading import open_tokenizer, own_labels
    from kdexport.models.registry import outline
    from kdexport.models.saving import longest_input, write_task
    from kdexport.runtime.predictor import Predictor, tensors_of
    from kdexport.tasks.classes import function_of

    folder, summary = artifact.resolve(Path(model)), read_summary(data)
    kind, embedding = task_class(summary.task), None
    side: TextSide = "right"
    tokenizer = open_tokenizer(str(folder), summary.task)
    if (folder / artifact.MANIFEST).is_file():
        file, task = artifact.model_file(folder, "fp32"), artifact.read_manifest(folder).task
        own, function, inputs, reads, usual = task.labels, task.function, task.inputs, task.max_length, task.max_length
        side = task.padding_side
        embedding = task.embedding and msgspec.structs.replace(task.embedding, problem=summary.problem)
    else:
        found = optimum_file(folder)
        assert found
        file, config = found, AutoConfig.from_pretrained(folder)
        own, inputs = own_labels(config), [tensor.name for tensor in tensors_of(file)[0]]
        function, usual = function_of(len(own), config.problem_type), 128
        reads = longest_input(outline(config, DEFAULT), tokenizer)
    if kind.embeds and not embedding:
        raise ModelError(f"teacher {model} is no artifact for {kind.name}", "Name one, or a model of PyTorch")
    if function != "softmax" and not kind.embeds:
        raise ModelError(f"teacher {model} does not choose one label of several", "Name a single-label classifier")
    known = kind.known_as(summary.labels, own)
    labels = [] if kind.embeds else match_labels(own, known, model, can_learn=False)
    write_task(
        tokenizer, inputs, reads, max_length, labels, out, task=summary.task, at_most=usual, function=function,
        padding_side=side, embedding=embedding,
    )  # fmt: skip
    for part in file.parent.glob(f"{file.name}*"):  # weights of more than 2 GB stand beside the graph
        shutil.copyfile(part, out / part.name)
    if (folder / "config.json").is_file():
        shutil.copyfile(folder / "config.json", out / "config.json")
    warn_of(Predictor(load_task(out), out / file.name).task, some_rows(data))


def _take_stored(settings: spec.Spec, model: str, data: Path, out: Path, first: Path | None) -> None:
    from kdexport.distill.stored import take_stored

    labels = take_stored(Path(model), data, rows_of_sources(settings.data), settings.task, out)
    _stand_in(settings, labels, data, out, first)


def _take_asked(settings: spec.Spec, model: str, data: Path, out: Path) -> None:
    """Take the answers that a stage of its own asked for: logits of the rows in `data`, in the order of its labels."""
    shutil.copytree(data / "logits", out / "logits", dirs_exist_ok=True)
    _stand_in(settings, read_summary(data).labels, data, out, None)


def _stand_in(settings: spec.Spec, labels: list[str], data: Path, out: Path, first: Path | None) -> None:
    """Write task and tokenizer of a teacher that has none to give: of the `first` one, or of the students' base.

    Where students are made from that base, its weights are written too, with a new head for the labels.
    """
    from transformers import set_seed

    from kdexport.distill.stored import width_of
    from kdexport.distill.teacher import some_rows, warn_of
    from kdexport.models.embedder import student_pooling
    from kdexport.models.loading import open_config, open_model
    from kdexport.models.saving import save_model, save_task

    def write(config: TaskConfig) -> None:
        own = config.embedding and msgspec.structs.replace(config.embedding, width=width_of(out))
        write_json(out / "task.json", msgspec.structs.replace(config, labels=labels, embedding=own))

    if first:
        write(load_task(first).config)
        shutil.copyfile(first / "tokenizer.json", out / "tokenizer.json")
        return
    base = base_for_students(settings)
    assert base
    set_seed(settings.seed)
    asked, problem = settings.data.max_length, settings.data.problem
    function = task_class(settings.task, problem).function
    opened = open_model(base, open_config(base), settings.task, labels, function, pooling=student_pooling(base))
    save_task(opened, asked, labels, out, task=settings.task, function=function, problem=problem)
    write(load_task(out).config)
    if gives_base(settings):
        save_model(opened, out)
    else:
        opened.model.config.save_pretrained(out)
    warn_of(load_task(out), some_rows(data))
