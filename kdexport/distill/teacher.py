"""The teacher: opened, fine-tuned if asked, its labels and the data's brought together."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, set_seed

from kdexport import spec
from kdexport.data import read_rows, read_summary, sampled
from kdexport.distill.opened import Opened, open_config, open_model, own_labels
from kdexport.distill.train import Recipe, fit
from kdexport.errors import ModelError
from kdexport.files import write_json
from kdexport.models import has_head
from kdexport.progress import say, warn
from kdexport.tasks import PROBLEMS, TASKS, images, load_task
from kdexport.tasks import audio as sound
from kdexport.tasks.classes import function_of
from kdexport.tasks.config import Function, TaskConfig

_DEFAULT_MAX_LENGTH = 128
# Of a language model's vocabulary, as many tokens are kept with their probability: see `tasks/causal_lm.py`, and
# benchmarks/soft_targets.py for how near their loss is to the whole one.
_SOFT_TARGETS = 64


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
    if of_task == "causal-lm":
        labels, function = [], "none"
        if settings.train is None and not has_head(config, of_task):
            raise ModelError(f"teacher {settings.model} is no language model", "Name one, such as a GPT-2")
    elif settings.train is None:
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
    save_task(opened, max_length, labels, out, task=of_task, function=function, rows=some, kept=_SOFT_TARGETS)
    task = load_task(out)
    for remark in task.remarks(some):
        say(f"teacher: {remark}")
    if settings.train is not None:
        recipe = Recipe(
            epochs=settings.train.epochs,
            learning_rate=settings.train.learning_rate,
            batch_size=settings.train.batch_size,
            seed=seed,
            dtype=settings.train.dtype,
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


def some_rows(data: Path) -> list[dict[str, Any]]:
    """Up to 500 training rows, always the same ones."""
    rows = read_rows(data, "train")
    return [rows[i] for i in sampled(len(rows), 500)]


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
    kept: int = 1,
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
        kept: of language models, how many of the most probable tokens an answer holds.
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
    if task == "causal-lm":  # GPT-2 takes token types, and its exported graph does not
        accepted.discard("token_type_ids")
    reads = longest_input(model.config, tokenizer)
    kept = kept if task == "causal-lm" else 0
    write = partial(write_task, task=task, function=function, at_most=at_most, kept=kept)
    write(tokenizer, accepted, reads, max_length, labels, out)


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
    kept: int = 0,
) -> None:
    """Write tokenizer files and `task.json` for a model that takes the inputs `accepted` and `reads` so many tokens.

    See `save_task` for the rest.
    """
    config = TaskConfig(
        task=task,
        labels=list(labels),
        inputs=[name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted],
        max_length=_length(reads, max_length, at_most),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        pad_type_id=tokenizer.pad_token_type_id,
        padding_side=tokenizer.padding_side,
        function=function,
        kept=min(kept, len(tokenizer)),
        end_id=tokenizer.eos_token_id if kept else None,
    )
    # A tokenizer.json may carry truncation and padding of its own, which other runtimes would follow.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = config.max_length
    if kept:  # or it gives token types, which no graph takes
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = config.inputs
    tokenizer.save_pretrained(out)
    write_json(out / "task.json", config)


def save_model(opened: Opened, out: Path) -> None:
    """Write config and weights as safetensors."""
    opened.model.save_pretrained(out, safe_serialization=True)


def read_length(config: Any, tokenizer: PreTrainedTokenizerFast, asked: int | None) -> int:
    """How many tokens are read of each text.

    Raises:
        ModelError: more are asked for than the model reads.
    """
    return _length(longest_input(config, tokenizer), asked, _DEFAULT_MAX_LENGTH)


def _length(reads: int, asked: int | None, at_most: int) -> int:
    if asked and asked > reads:
        raise ModelError(f"max_length is {asked}, but the model reads {reads} tokens", "Lower it")
    return asked or min(at_most, reads)


def longest_input(config: Any, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many tokens a model of this configuration reads."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        positions -= (config.pad_token_id or 0) + 1  # these count positions from pad_token_id + 1
    declared = tokenizer.model_max_length
    return int(min(positions, declared if 0 < declared < 10**6 else positions))
