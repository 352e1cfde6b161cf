"""Build a student, with first weights from the teacher's, and train it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from kdexport import ranks, spec
from kdexport.analysis import sampled
from kdexport.data import read_rows, read_summary
from kdexport.data.rows import Row, Rows
from kdexport.distill.embedding import build_embedder
from kdexport.distill.soft_targets import TRANSFER
from kdexport.distill.targets import SoftTargets
from kdexport.distill.teacher import some_rows
from kdexport.distill.train import TrainConfig, fit
from kdexport.distill.transcripts import heard_once
from kdexport.errors import ModelError, counted
from kdexport.files import write_json
from kdexport.models.convolution import build_conv
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor, open_config, open_model, open_processor
from kdexport.models.registry import open_trained, task_name
from kdexport.models.saving import save_model, save_task, save_writer
from kdexport.models.shrink import keep_layers, layers_of, narrow
from kdexport.models.textnet import TextNet, TextNetConfig, TextNetForTokens, start_as_mean
from kdexport.models.transcriber import audio_of, cut
from kdexport.models.vocabulary import trim_vocabulary
from kdexport.progress import say
from kdexport.spec import derive
from kdexport.tasks import load_task, task_class
from kdexport.tasks.base import writes_speech
from kdexport.tasks.config import read_config
from kdexport.tasks.inputs.audio import longest_seconds, speech_seconds
from kdexport.tasks.metrics import Array

# Width of a TextNet's features, and of the layer before its logits: docs/decisions.md.
_NETWORK_WIDTH, _NETWORK_HEAD = 256, 512
_LEAST_STEPS = 100  # of a trial


class _Texts:
    """The texts of rows, read from disk by each loop over them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[str]:
        return (row[column] for row in self._rows for column in ("text", "text_pair") if row.get(column))


class Untrained(NamedTuple):
    """An untrained student, where its weights come from, and the teacher's ids of a trimmed vocabulary."""

    opened: ModelAndProcessor
    origin: str
    token_ids: NDArray[np.int64] | None = None
    axes: Array | None = None  # [D, d], on which the teacher's vectors are learned


def train_student(
    student: spec.Student,
    name: str,
    distill: spec.Distill,
    *,
    data: Path,
    teacher: Path,
    targets: Path,
    seed: int,
    out: Path,
    hard: bool = False,
    share: float = 1.0,
) -> None:
    """Build the student that `student.model` calls `name`, train it, and write it as a Hugging Face folder.

    `out` gets the model, `task.json`, `training.json` and `reference.npy`, the student's logits in PyTorch for the test
    rows and the task's probes (float32 [N, C]), for verification.

    Args:
        hard: train on labels alone: the baseline.
        share: fraction of the epochs; below 1 it is a trial, whose weights are not saved.
    """
    built = _start(student, name, data, teacher, targets, seed, out)
    title, model = ("baseline" if hard else "student"), built.opened.model
    task = load_task(out)
    rows, validation = read_rows(data, "train"), read_rows(data, "validation")
    if hard:  # what the teacher wrote is no label
        rows = rows.where(lambda row: not row.get("heard"))
    unlabelled = Rows() if hard else transfer_rows(targets)
    start = derive.start_of(student, name, task.menu)
    epochs = derive.epochs(distill, len(rows), len(unlabelled), start, task.menu).value
    usual = derive.batch_size(distill, len(rows), start, task.menu)
    dealt = derive.dealt(usual, ranks.size(), distill.accumulate, "distill.batch_size")
    if dealt != usual:
        say(f"{title}: {dealt.value:g} rows a step: {dealt.reason}")
    batch = int(dealt.value)
    if share < 1:  # a trial sees rows of train only, and as many whatever the student, so that trials compare
        passes = derive.epochs(distill, len(rows), len(unlabelled)).value
        whole, unlabelled = passes * (len(rows) + len(unlabelled)), Rows()
        examples = max(round(share * whole), min(_LEAST_STEPS * batch, round(whole)))
        places = sampled(len(rows), max(examples, batch))
        rows = rows.take(places)
        epochs = max(1, examples // len(rows))
    how = TrainConfig(
        epochs=int(epochs),
        learning_rate=derive.learning_rate(
            distill, student, name, getattr(model.config, "hidden_size", 0), task.menu, batch
        ).value,
        batch_size=batch,
        seed=seed,
        losses=spec.weights_of(distill),
        temperature=distill.temperature,
        alpha=distill.alpha,
        patience=distill.patience if share == 1 else None,
        dtype=distill.dtype,
        accumulate=distill.accumulate,
        checkpoint_gradients=distill.checkpoint_gradients,
        compile=distill.compile,
    )
    soft = None if hard else SoftTargets(load_task(teacher), targets / "train.npy", axes=built.axes)
    if soft is not None and share < 1:
        soft = soft.take(places)
    if soft is not None and unlabelled:
        files = (targets / f"{part}.npy" for part in ("train", TRANSFER))
        soft = SoftTargets(load_task(teacher), *files, axes=built.axes)
        rows += unlabelled
    learned: Sequence[Row] = rows
    encoded = None
    if writes_speech(task):
        learned, soft, encoded = heard_once(model, task, rows, soft)
    parameters = model.num_parameters()
    say(
        f"{title}: {name}, {parameters / 1e6:.2g} M parameters, {built.origin}; "
        f"{counted(how.epochs, 'epoch')} over {counted(len(learned), 'row')}, learning rate {how.learning_rate:g}"
    )
    curve = fit(
        model,
        task,
        learned,
        soft,
        how,
        encoded=encoded,
        validation=validation,
        validation_targets=np.load(targets / "validation.npy"),
        teacher=teacher,
        token_ids=built.token_ids,
        work=out,
        title=f"{'try' if share < 1 else 'train'} {title if share == 1 else name}",
    )
    write_json(
        out / "training.json",
        {"student": name, "recipe": how, "curve": curve, "origin": built.origin, "parameters": parameters},
    )
    if share == 1:
        np.save(out / "reference.npy", logits_of(model, task, [*read_rows(data, "test"), *task.probes()]))
        save_model(built.opened, out)


def write_untrained(
    student: spec.Student, name: str, *, data: Path, teacher: Path, targets: Path, seed: int, out: Path
) -> None:
    """Write an untrained student, to be measured, and its parameters as `untrained.json`."""
    built = _start(student, name, data, teacher, targets, seed, out)
    write_json(out / "untrained.json", {"parameters": built.opened.model.num_parameters(), "origin": built.origin})
    save_model(built.opened, out)


def _start(
    student: spec.Student, name: str, data: Path, teacher: Path, targets: Path, seed: int, out: Path
) -> Untrained:
    set_seed(seed)
    rows = read_rows(data, "train") + transfer_rows(targets)
    some, config = some_rows(data), read_config(teacher)
    if config.decoder:
        return build_writer(student, name, teacher, some, out)
    if derive.start_of(student, name, task_class(config.task).menu) == "random":
        shape = derive.shape_of(name)
        made = build_conv(shape.width, config, some, recurrent=shape.network == "gru")
        built = Untrained(made, "random weights")
    else:
        built = build_student(student, name, teacher, _Texts(rows), targets)
    save_task(
        built.opened, config.max_length, config.labels, out, task=config.task, function=config.function, rows=some,
        words=read_summary(data).words, language=config.language, problem=read_summary(data).problem,
    )  # fmt: skip
    return built


def build_writer(
    student: spec.Student, name: str, teacher_folder: Path, rows: list[dict[str, Any]], out: Path
) -> Untrained:
    """Build a smaller Whisper that reads as long as these rows are, and write its `task.json` and processor."""
    teacher, shape, task = open_trained(teacher_folder), derive.shape_of(name), task_name(teacher_folder)
    wanted = list(shape.indices) or shape.layers
    layers = layers_of(teacher.config.decoder_layers, wanted, spread=shape.kind == "spread")
    how = audio_of(teacher.config, student.seconds or longest_seconds(rows))
    model = cut(teacher, layers, how)
    save_writer(model, str(teacher_folder), out, how, task, 1, speech_seconds(rows))
    origin = f"the teacher's encoder and layers {', '.join(map(str, layers))} of its decoder"
    return Untrained(ModelAndProcessor(model, None), f"{origin}, {how.length // 100} s of sound")


def transfer_rows(targets: Path) -> Rows:
    """Return the rows of a finished targets stage that the teachers alone label."""
    return read_rows(targets, TRANSFER) if (targets / f"{TRANSFER}.jsonl").exists() else Rows()


def build_student(
    student: spec.Student, name: str, teacher_folder: Path, texts: Iterable[str] = (), targets: Path | None = None
) -> Untrained:
    """Build the student that `student.model` calls `name` with its first weights; `texts` decide its vocabulary.

    `targets` is the finished stage, whose vectors decide those of an embedder.

    Raises:
        ModelError: the teacher has too few layers or no weights, or the named model can't be opened.
    """
    shape = derive.shape_of(name)
    if task_class(task_name(teacher_folder)).embeds:
        found = SoftTargets(load_task(teacher_folder), targets / "train.npy") if targets else None
        return Untrained(*build_embedder(student, name, teacher_folder, texts, found))
    if shape.kind == "model":
        config = read_config(teacher_folder)
        opened = open_model(name, open_config(name), config.task, config.labels, config.function)
        if derive.vocabulary(student, name, config.task) == "corpus":
            trim_vocabulary(opened.processor, opened.model, texts)
        return Untrained(opened, f"its weights from {name}")
    teacher = open_trained(teacher_folder)
    task = task_name(teacher_folder)
    whole = derive.vocabulary(student, name, task) == "whole" or task_class(task).modality != "text"
    tokenizer = open_processor(str(teacher_folder), task)
    kept = None if whole else trim_vocabulary(tokenizer, teacher, texts)
    size = "" if kept is None else f", a vocabulary of {len(kept):,}"
    if derive.pools(student, name):
        model, origin = _network(shape, student, teacher, tokenizer, task)
    elif shape.kind == "narrow":
        made = narrow(teacher, shape.layers, shape.width, project_layers=student.start == "projections")
        model, variance = made.model, f"{made.kept_variance:.0%}"
        origin = f"embeddings from the teacher's by PCA ({variance} of their variance)"
        if made.projected_layers:
            origin = f"embeddings and {made.projected_layers} layers from the teacher's by PCA ({variance})"
    else:
        wanted = list(shape.indices) or shape.layers
        total = getattr(teacher.config, "num_hidden_layers", 0)
        indices = layers_of(total, wanted, spread=shape.kind == "spread")
        model, origin = keep_layers(teacher, indices), f"the teacher's layers {', '.join(map(str, indices))}"
        if task_class(task).transcribes:  # what reads the waveform is trained already
            model.freeze_feature_encoder()
    return Untrained(ModelAndProcessor(model, tokenizer), origin + size, kept)


@torch.no_grad()
def _network(
    shape: derive.Shape, student: spec.Student, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str
) -> tuple[PreTrainedModel, str]:
    """Build a `TextNet`; its table is the teacher's, whole or on its principal axes."""
    words = teacher.get_input_embeddings().weight
    width = student.embedding or words.shape[1]
    if width > words.shape[1]:
        raise ModelError(
            f"student.embedding is {width}, the teacher's embeddings are {words.shape[1]} wide", "Lower it"
        )
    encoder = shape.kind == "narrow"
    network = (TextNetForTokens if task_class(task).has_words else TextNet)(
        TextNetConfig(
            kind="encoder" if encoder else shape.network,
            vocab_size=len(words),
            embedding_size=width,
            hidden_size=shape.width or _NETWORK_WIDTH,
            head_size=_NETWORK_HEAD,
            num_hidden_layers=shape.layers,
            num_attention_heads=max(1, shape.width // 64),
            pad_token_id=tokenizer.pad_token_id or 0,
            id2label=teacher.config.id2label,
            label2id=teacher.config.label2id,
            problem_type=teacher.config.problem_type,
        )
    )
    onto, fraction = _principal_axes(words, width)
    network.embeddings.weight.copy_(words @ onto if encoder else (words - words.mean(dim=0)) @ onto)
    if encoder:
        start_as_mean(network)
        _start_stream(network, teacher, onto, shape.width)
    network.embeddings.weight[network.config.pad_token_id] = 0.0
    part = "" if fraction > 0.9999 else f" by PCA ({fraction:.0%} of their variance)"
    return network, f"the teacher's embeddings{part}"


def _principal_axes(table: Tensor, width: int) -> tuple[Tensor, float]:
    """Return the principal axes [H, width] of a table [V, H], and their fraction of its variance."""
    if width == table.shape[1]:
        return torch.eye(width, dtype=table.dtype), 1.0
    variances, axes = torch.linalg.eigh(torch.cov((table - table.mean(dim=0)).T.float()).double())
    return axes[:, -width:].flip(1).to(table.dtype), float(variances[-width:].sum() / variances.sum())


def _start_stream(network: TextNet, teacher: PreTrainedModel, onto: Tensor, width: int) -> None:
    """Initialise what an encoder's first layer reads: the teacher's positions, if it has a table, and the main axes."""
    block = network.encoder.embeddings
    theirs = getattr(teacher.base_model.embeddings, "position_embeddings", None)
    if isinstance(theirs, torch.nn.Embedding):
        first = 0 if theirs.padding_idx is None else theirs.padding_idx + 1  # RoBERTa counts from there
        positions = theirs.weight[first:] @ onto
        n = min(len(positions), len(block.position_embeddings.weight))
        block.position_embeddings.weight[:n].copy_(positions[:n])
    block.token_type_embeddings.weight.zero_()
    if hasattr(network.encoder, "embeddings_project"):
        normed = torch.nn.functional.layer_norm(network.embeddings.weight, onto.shape[1:])
        axes = _principal_axes(normed, min(width, onto.shape[1]))[0].T  # a wider stream has random ones beside them
        network.encoder.embeddings_project.weight[: len(axes)].copy_(axes)
        torch.nn.init.zeros_(network.encoder.embeddings_project.bias)
