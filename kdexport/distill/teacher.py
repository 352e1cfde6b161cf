"""The teacher: opened, fine-tuned if asked, its labels and the data's brought together."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from kdexport import spec
from kdexport.data import demo, read_rows, read_summary, sampled
from kdexport.distill.train import Recipe, fit
from kdexport.errors import ModelError
from kdexport.models import AUTO_CLASSES, has_head
from kdexport.progress import say, warn
from kdexport.rundir import write_json
from kdexport.tasks import PROBLEMS, TASKS, images, load_task
from kdexport.tasks import audio as sound
from kdexport.tasks.classes import function_of
from kdexport.tasks.config import Function, TaskConfig

logging.set_verbosity_error()  # "newly initialized" warnings: we say ourselves what is new

_DEFAULT_MAX_LENGTH = 128
# As transformers' configurations name them; without one a pipeline takes softmax.
_PROBLEM_TYPE = {"softmax": None, "sigmoid": "multi_label_classification", "none": "regression"}


class Opened(NamedTuple):
    """A model and what makes its inputs: a tokenizer, or a processor of images or of sound.

    The model has a new head where `labels` are not its own.
    """

    model: PreTrainedModel
    processor: Any


def prepare_teacher(
    settings: spec.Teacher, data: Path, max_length: int | None, seed: int, out: Path, folder: Path | None = None
) -> None:
    """Write the teacher as a Hugging Face folder with `task.json`; fine-tune it first if the spec says so.

    Args:
        settings: of one teacher.
        data: finished data stage.
        max_length: tokens kept of each text; see `save_task`.
        seed: of a new head, and of the order of rows.
        out: an existing folder.
        folder: where the model is, if not at `settings.model`, which names it then.

    Raises:
        ModelError: no model, no tokenizer, no trained head, labels that don't fit the data's, or no labelled rows
            to fine-tune on.
    """
    assert isinstance(settings.model, str)
    set_seed(seed)
    known = read_summary(data).labels
    source = str(folder or settings.model)
    config, summary = open_config(source), read_summary(data)
    of_task, function = summary.task, PROBLEMS[summary.problem][0]
    if settings.train is None:
        if (theirs := function_of(len(own_labels(config)), config.problem_type)) != function:
            raise ModelError(
                f"teacher {settings.model} has scores by {theirs}, data.problem {summary.problem} wants {function}",
                "Set problem_type in its config.json, or fine-tune it: --teacher-epochs 3",
            )
        if function == "none":
            known = own_labels(config)
        labels = match_labels(own_labels(config), known, has_head(config, of_task), settings.model)
    else:
        labels = own_labels(config) if set(own_labels(config)) == set(known) else known
    opened = open_model(source, config, of_task, labels, function, to_train=settings.train is not None)
    some = some_rows(data)
    save_task(opened, max_length, labels, out, task=of_task, function=function, rows=some)
    task = load_task(out)
    for remark in task.remarks(some):
        say(f"teacher: {remark}")
    if settings.train is not None:
        recipe = Recipe(
            epochs=settings.train.epochs,
            learning_rate=settings.train.learning_rate,
            batch_size=settings.train.batch_size,
            seed=seed,
        )
        train, validation = (_labelled(data, split) for split in ("train", "validation"))
        say(f"teacher: fine-tuning on {len(train):,} rows, {recipe.epochs} epochs")
        curve = fit(
            opened.model,
            task,
            train,
            None,
            recipe,
            validation=validation,
            work=out,
            title="fine-tune teacher",
        )
        write_json(out / "training.json", {"recipe": recipe, "curve": curve})
    save_model(opened, out)


def _labelled(data: Path, split: str) -> list[dict[str, Any]]:
    rows = [row for row in read_rows(data, split) if row["label"] is not None]
    if not rows:
        raise ModelError(f"the {split} rows have no labels to fine-tune the teacher on", "Leave out teacher.train")
    return rows


def open_config(model: str) -> Any:
    """A model's configuration, from a folder or the hub.

    Raises:
        ModelError: there is none.
    """
    folder = Path(model)
    local = folder.exists() or model.startswith((".", "/", "~"))
    if local and not (folder / "config.json").is_file():
        missing = "does not exist" if not folder.exists() else "holds no config.json"
        raise ModelError(f"model folder {model} {missing}", "Name a folder written by save_pretrained")
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # OSError, ValueError, KeyError and connection errors, by cause
        fix = "It comes with: pip install 'kdexport[demo]'" if model == demo.HUB_ID else ""
        raise ModelError(f"model {model!r} can't be opened: {_first_line(error)}", fix) from None


def some_rows(data: Path) -> list[dict[str, Any]]:
    """Up to 500 training rows, always the same ones."""
    rows = read_rows(data, "train")
    return [rows[i] for i in sampled(len(rows), 500)]


def open_model(
    model: str,
    config: Any,
    task: str,
    labels: Sequence[str],
    function: Function = "softmax",
    *,
    to_train: bool = False,
) -> Opened:
    """A model with a head for these labels, and its tokenizer or processor.

    Args:
        model: folder or hub id.
        config: its configuration, which is changed to these labels.
        task: its name.
        labels: in the order of the logits.
        function: from logits to scores.
        to_train: whether it is trained next; then a folder without weights gets random ones.

    Raises:
        ModelError: weights, tokenizer or processor are missing or unreadable.
    """
    processor = open_processor(model, task)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = _PROBLEM_TYPE[function]
    if Path(model).is_dir() and not _has_weights(Path(model)):
        if not to_train:
            raise ModelError(f"model folder {model} holds no weights", "Train it from random ones: --teacher-epochs 3")
        say(f"teacher: {model} holds no weights, so it starts from random ones")
        return Opened(AUTO_CLASSES[task].from_config(config), processor)
    try:
        opened = AUTO_CLASSES[task].from_pretrained(model, config=config, ignore_mismatched_sizes=True)
    except Exception as error:
        raise ModelError(f"model {model!r} can't be opened: {_first_line(error)}") from None
    return Opened(opened, processor)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def open_classifier(model: str, config: Any, task: str) -> Opened:
    """A model with the head that it was trained with, and its tokenizer or processor.

    Raises:
        ModelError: it has no head, or some of its weights, or its tokenizer, are missing or unreadable.
    """
    if not has_head(config, task):
        kind = ", ".join(config.architectures or []) or "of no known kind"
        raise ModelError(f"model {model!r} has no classification head: it is {kind}", "Name a trained classifier")
    processor = open_processor(model, task)
    try:
        opened, found = AUTO_CLASSES[task].from_pretrained(model, output_loading_info=True)
    except Exception as error:
        raise ModelError(f"model {model!r} can't be opened: {_first_line(error)}") from None
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"model {model!r} lacks trained weights: {', '.join(missing[:4])}", "Save the whole model")
    return Opened(opened, processor)


def open_processor(model: str, task: str) -> Any:
    """What makes a model's inputs, from a folder or the hub: a fast tokenizer, or a processor of images or of sound.

    Raises:
        ModelError: there is none.
    """
    reads = TASKS[task].reads
    if reads == "text":
        return open_tokenizer(model, task)
    try:
        return (AutoImageProcessor if reads == "image" else AutoFeatureExtractor).from_pretrained(model)
    except Exception as error:
        raise ModelError(
            f"model {model!r} has no {reads} processor that can be opened: {_first_line(error)}",
            "Save it beside the model: processor.save_pretrained(folder)",
        ) from None


def open_tokenizer(model: str, task: str = "text-classification") -> PreTrainedTokenizerFast:
    """A model's fast tokenizer, from a folder or the hub.

    Raises:
        ModelError: there is none.
    """
    try:
        # Words of a list each begin with a space, for tokenizers that tell the beginning of a word by it.
        words = {"add_prefix_space": True} if task == "token-classification" else {}
        tokenizer = AutoTokenizer.from_pretrained(model, **words)
    except Exception as error:
        raise ModelError(
            f"model {model!r} has no tokenizer that can be opened: {_first_line(error)}",
            "Save it beside the model: tokenizer.save_pretrained(folder)",
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(f"model {model!r} has only a slow tokenizer, without tokenizer.json", "Convert it first")
    return tokenizer


def own_labels(config: Any) -> list[str]:
    """A configuration's label names in the order of its logits."""
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def match_labels(own: list[str], known: list[str], head: bool, model: str, *, can_learn: bool = True) -> list[str]:
    """The labels of a teacher that is used as it is, in the order of its logits, as the data spells them.

    Args:
        own: as the teacher names them.
        known: the data's, sorted.
        head: whether it was trained for them.
        model: what the teacher is called in errors.
        can_learn: whether it could be fine-tuned instead.

    Raises:
        ModelError: it has no trained head, or the data has labels that it doesn't know.
    """
    train_it = "Fine-tune it: --teacher-epochs 3" if can_learn else "Name one that knows them all"
    if not head:
        raise ModelError(f"teacher {model} has no trained classification head", train_it)
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


def save_task(
    opened: Opened,
    max_length: int | None,
    labels: Sequence[str],
    out: Path,
    *,
    task: str = "text-classification",
    function: Function = "softmax",
    at_most: int = _DEFAULT_MAX_LENGTH,
    rows: Sequence[dict[str, Any]] = (),
) -> None:
    """Write `task.json` and the files of the tokenizer or processor.

    Args:
        opened: the model, which says how much it reads, and its tokenizer or processor.
        max_length: tokens kept of each text; what the model reads, but `at_most` so many, when None.
        labels: in the order of the logits.
        out: an existing folder.
        task: its name.
        function: from logits to scores.
        at_most: see `max_length`.
        rows: some of train, for what a processor of sound leaves open.
    """
    model, tokenizer = opened
    if TASKS[task].reads != "text":
        image = audio = None
        if TASKS[task].reads == "image":
            image = images.config_of(tokenizer.to_dict(), getattr(model.config, "num_channels", 3))
        else:
            audio = sound.config_of(tokenizer.to_dict(), rows)
        inputs = [model.main_input_name]
        config = TaskConfig(task=task, labels=list(labels), inputs=inputs, function=function, image=image, audio=audio)
        tokenizer.save_pretrained(out)
        write_json(out / "task.json", config)
        return
    accepted = set(tokenizer.model_input_names) & set(signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", None) == 0:  # DeBERTa-v2 and -v3 take token types and read none
        accepted.discard("token_type_ids")
    reads = longest_input(model.config, tokenizer)
    write_task(tokenizer, accepted, reads, max_length, labels, out, task=task, function=function, at_most=at_most)


def write_task(
    tokenizer: PreTrainedTokenizerFast,
    accepted: Collection[str],
    reads: int,
    max_length: int | None,
    labels: Sequence[str],
    out: Path,
    *,
    task: str = "text-classification",
    function: Function = "softmax",
    at_most: int = _DEFAULT_MAX_LENGTH,
) -> None:
    """Write tokenizer files and `task.json` for a model that takes the inputs `accepted` and `reads` so many tokens.

    See `save_task` for the rest.
    """
    if max_length and max_length > reads:
        raise ModelError(f"max_length is {max_length}, but the model reads {reads} tokens", "Lower it")
    config = TaskConfig(
        task=task,
        labels=list(labels),
        inputs=[name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted],
        max_length=max_length or min(at_most, reads),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        pad_type_id=tokenizer.pad_token_type_id,
        padding_side=tokenizer.padding_side,
        function=function,
    )
    # A tokenizer.json may carry truncation and padding of its own, which other runtimes would follow.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = config.max_length
    tokenizer.save_pretrained(out)
    write_json(out / "task.json", config)


def save_model(opened: Opened, out: Path) -> None:
    """Write config and weights as safetensors."""
    opened.model.save_pretrained(out, safe_serialization=True)


def longest_input(config: Any, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many tokens a model of this configuration reads."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        positions -= (config.pad_token_id or 0) + 1  # these count positions from pad_token_id + 1
    declared = tokenizer.model_max_length
    return int(min(positions, declared if 0 < declared < 10**6 else positions))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
