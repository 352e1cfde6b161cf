"""Open a teacher, fine-tune it if asked, and match its labels with the data's."""

import re
from pathlib import Path
from typing import Any

from transformers import set_seed

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.data import read_rows, read_summary
from kdexport.distill.fine_tune import fine_tune
from kdexport.distill.teachers import EMBEDDER
from kdexport.distill.transcripts import prepare_transcriber
from kdexport.errors import ModelError
from kdexport.models.embedder import Pooling, is_embedder
from kdexport.models.loading import alphabet_of, open_config, open_model, own_labels
from kdexport.models.registry import has_head
from kdexport.models.saving import save_model, save_task
from kdexport.models.transcriber import is_transcriber
from kdexport.progress import say, warn
from kdexport.spec.teachers import has_weights
from kdexport.tasks import load_task, names, task_class
from kdexport.tasks.base import Task
from kdexport.tasks.classes import function_of

_TOP_K = 64  # tokens with a probability in a language model's soft targets: docs/decisions.md


def prepare_teacher(
    settings: spec.Teacher, data: Path, max_length: int | None, seed: int, out: Path, folder: Path | None = None
) -> None:
    """Write the teacher as a Hugging Face folder with `task.json`; fine-tune it first if the spec says so.

    The model is in `folder`, if not at `settings.model`, its name in errors.

    Raises:
        ModelError: no model, tokenizer or trained head, labels that don't fit the data's, or none to fine-tune on.
    """
    assert isinstance(settings.model, str)
    set_seed(seed)
    source = str(folder or settings.model)
    config, summary = open_config(source), read_summary(data)
    known = summary.labels
    if is_transcriber(config):
        if settings.train is not None:
            raise ModelError(f"teacher.train: {settings.model} writes texts, and is not trained here", "Leave it out")
        prepare_transcriber(summary, source, some_rows(data), out)
        return
    of_task, kind = summary.task, task_class(summary.task, summary.problem)
    function = kind.function
    train = settings.train
    embeds = kind.together and train is None and is_embedder(source)
    if embeds:
        scores = "so its scores are cosines; --teacher-epochs 3 fine-tunes it instead"
        say(f"teacher: {settings.model} embeds texts, {scores}")
    elif train is None and not has_weights(source) and not kind.labels_judge:
        say(f"teacher: {settings.model} holds no weights, so it is trained from random ones")
        train = spec.TeacherTraining()
    elif train is None and kind.has_labels and not has_head(config, of_task):
        say(f"teacher: {settings.model} has no trained head, so it is fine-tuned first")
        train = spec.TeacherTraining()
    if not kind.has_labels:
        labels = []
        if train is None and kind.heads and not has_head(config, of_task):
            raise ModelError(f"teacher {settings.model} is no language model", "Name one, such as a GPT-2")
    elif train is None and kind.transcribes:
        labels = alphabet_of(source, getattr(config, "vocab_size", config.num_labels))
        if strange := sorted({*known} - {*labels}):
            what = f"teacher {settings.model} does not write the data's character {strange[0]!r}"
            raise ModelError(what, "Spell it as the teacher does, such as numbers in words")
    elif train is None and not embeds:
        theirs = function_of(len(own_labels(config)), config.problem_type)
        if theirs != function and (theirs not in kind.functions or len(own_labels(config)) > 1):
            raise ModelError(
                f"teacher {settings.model} scores by {theirs}, but data.problem {summary.problem} needs {function}",
                "Set problem_type in its config.json, or fine-tune it: --teacher-epochs 3",
            )
        known = own_labels(config) if function == "none" else kind.known_as(known, own_labels(config))
        labels = match_labels(own_labels(config), known, settings.model)
    else:
        labels = own_labels(config) if set(own_labels(config)) == set(known) else known
        if kind.transcribes:
            config.vocab_size = len(labels)
    opened = open_model(
        source, config, of_task, labels, function, to_train=train is not None or embeds, pooling=settings.pooling
    )
    some = some_rows(data)
    words = summary.words
    save_task(
        opened, max_length, labels, out, task=of_task, function=function, rows=some, top_k=_TOP_K, words=words,
        problem=summary.problem,
    )  # fmt: skip
    task = load_task(out)
    warn_of(task, some)
    if train is not None:
        fine_tune(opened, task, train, data, seed, out, trained=has_weights(source))
    save_model(opened, out)
    if embeds:
        save_embedder(source, max_length, out / EMBEDDER)


def save_embedder(source: str, max_length: int | None, out: Path, pooling: Pooling | None = None) -> None:
    """Write a model that embeds queries and passages, beside the one whose weights students take."""
    out.mkdir(exist_ok=True)
    embedding = next(name for name in names() if task_class(name).embeds)
    opened = open_model(source, open_config(source), embedding, [], "none", pooling=pooling)
    save_task(opened, max_length, [], out, task=embedding, function="none", problem="single-label")
    save_model(opened, out)


def warn_of(task: Task, rows: list[dict[str, Any]]) -> None:
    """Warn of how these rows are read."""
    for remark in task.remarks(rows):
        warn(f"teacher: {remark}")


def some_rows(data: Path) -> list[dict[str, Any]]:
    """Return up to 500 training rows, always the same ones."""
    rows = read_rows(data, "train")
    return [rows[i] for i in sampled(len(rows), 500)]


def match_labels(own: list[str], known: list[str], model: str, *, can_learn: bool = True) -> list[str]:
    """Return the labels of a teacher that is not fine-tuned, in the order of its logits, as the data spells them.

    `own` are the teacher's, `known` the data's, sorted; `can_learn`: whether errors suggest fine-tuning.

    Raises:
        ModelError: it doesn't know a label of the data.
    """
    train_it = "Fine-tune it: --teacher-epochs 3" if can_learn else "Name one that knows them all"
    if len(known) > len(own):
        raise ModelError(f"the data has {len(known)} labels, teacher {model} knows {len(own)}", train_it)
    spelled = {label.casefold(): label for label in known}
    names = [spelled.get(label.casefold(), label) for label in own]
    if set(known) <= set(names):
        return names
    if all(label.isdecimal() for label in known) and int(known[-1]) < len(own):
        return own  # the data's numbers are places in the teacher's order
    if all(re.fullmatch(r"LABEL_\d+", label) for label in own) and len(own) == len(known):
        warn(f"teacher {model} does not name its labels; taken in the data's order: {', '.join(known[:8])}")
        return list(known)
    strange = [label for label in known if label not in names]
    raise ModelError(
        f"teacher {model} does not know the data's label {strange[0]!r}"
        + (f" (nor {len(strange) - 1} others)" if len(strange) > 1 else "")
        + f"; it knows {', '.join(own[:8])}",
        f"Rename the labels, or {train_it[0].lower()}{train_it[1:]}",
    )
