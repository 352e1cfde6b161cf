"""Train a model, teacher or student, with the Transformers `Trainer` and our loss.

Mixed precision, several processes (`torchrun`, `accelerate launch`), gradient clipping and checkpoints are the
Trainer's. Ours are the loss, the order of rows, and that a resumed training ends with the same weights.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdexport.distill.layer_losses import Matching, matched
from kdexport.distill.losses import OF_OBJECTIVE, Term, objective, total, value_at
from kdexport.distill.monitor import WHOLE, Curve, Ledger, Watch, curve_of, gradient_shares, say_shares
from kdexport.errors import SpecError, counted
from kdexport.models.inference import logits_of
from kdexport.progress import bar, say
from kdexport.spec import Schedule, Weight
from kdexport.tasks.base import Task
from kdexport.tasks.config import Arrays
from kdexport.tasks.inputs.media import Encoded
from kdexport.tasks.judging import metric
from kdexport.tasks.menus import OF_LAYERS
from kdexport.tasks.metrics import Array

CHECKPOINT_EVERY_S = 20.0  # one holds weights and optimizer, three times the model

Rows = Sequence[dict[str, Any]]

_MIXED = "ACCELERATE_MIXED_PRECISION"

# Weights that begin at random, most often a head, learn so many times as fast as trained ones: docs/decisions.md.
_FRESH_RATE = 10.0

_KEPT_BYTES = 1 << 30  # of decoded images and recordings, which every epoch reads

_SHARES_EVERY = 200  # steps; measuring them costs one more backward pass a term


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Hyper-parameters of a training; see `losses` for the objective.

    A `Schedule` moves linearly from the first planned step to the last. Without `patience` the last epoch's weights are
    used; with it, training stops after so many epochs without a better validation metric, and the best epoch's are.
    With `dtype` bfloat16, matrix products are in half precision and weights stay float32.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    losses: dict[str, Weight] = msgspec.field(default_factory=lambda: {"kl": 1.0})
    temperature: float | Schedule = 1.0
    alpha: float | Schedule = 0.0
    patience: int | None = None
    dtype: str = "float32"


def fit(
    model: PreTrainedModel,
    task: Task,
    rows: Rows,
    soft_targets: Array | None,
    config: TrainConfig,
    *,
    validation: Rows,
    work: Path,
    title: str,
    fresh: Collection[str] = (),
    teacher: Path | None = None,
    token_ids: Array | None = None,
    validation_targets: Array | None = None,
    encoded: Sequence[Arrays] | None = None,
) -> Curve:
    """Train a model in place; return one record an epoch.

    Args:
        rows: those without a label (None) learn from the teacher alone.
        soft_targets: the teacher's logits float [N, *answer_shape] for `rows`; None trains on labels alone.
        work: a folder for checkpoints; a call with the same arguments resumes from the last one.
        fresh: names of parameters that begin at random in a trained model; they learn ten times as fast.
        teacher: its folder, for losses of layers.
        encoded: the rows as the model reads them in training; as their task encodes them when None.
        token_ids: int64 [V], the teacher's token id of each of the model's, where its vocabulary was trimmed.

    Returns:
        `epoch`; `loss`, the mean over its steps; `validation`, the task's metric, or where no validation row has a
        label the agreement with `validation_targets`. Of each of several terms `terms/NAME`, its mean size without its
        weight, and, in epochs in which it was measured on one batch, `shares/NAME`, its fraction of the gradient.

    Raises:
        SpecError: settings that can't teach, or patience without a metric.
        ModelError: training diverged; or student and teacher don't fit for losses of layers.
    """
    layers = _layer_losses(config, soft_targets)
    judge, higher_is_better = _judge(task, validation, validation_targets)
    if config.patience is not None and judge is None:
        raise SpecError(
            "distill.patience needs a metric, and the validation rows have neither labels nor soft targets", "Remove it"
        )
    encoded, labels = task.tokenize(rows) if encoded is None else encoded, task.label_array(rows)
    if isinstance(encoded, Encoded):
        encoded.keep = _KEPT_BYTES
    lengths = task.sizes(encoded)

    def collate(chosen: list[int]) -> dict[str, Tensor]:
        batch = task.collate([encoded[i] for i in chosen]) | {"labels": labels[chosen]}
        if soft_targets is not None:
            batch["teacher_logits"] = soft_targets[chosen]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    # Half precision ends with this training: transformers leaves a variable, and the model's forward wrapped.
    launched = os.environ.get(_MIXED)
    ledger = Ledger(config.learning_rate)
    attached = matched(model, teacher, layers, token_ids, task=task, rows=rows[:100]) if teacher and layers else None
    with (
        attached or nullcontext() as matching,
        bar(title, config.epochs * -(-len(rows) // config.batch_size)) as advance,
    ):
        trainer = _Trainer(
            config,
            lengths,
            matching,
            ledger,
            task.objective,
            fresh,
            model=model,
            args=_arguments(config, work / "checkpoints", bool(layers)),
            train_dataset=range(len(rows)),
            data_collator=collate,
        )
        watch = Watch(
            judge=judge,
            ledger=ledger,
            higher_is_better=higher_is_better,
            patience=config.patience,
            folder=work / "best",
            checkpoint_every_s=CHECKPOINT_EVERY_S,
            advance=advance,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work / "checkpoints"))
        curve = curve_of(trainer.state.log_history)
        if config.patience is not None:
            trainer.accelerator.wait_for_everyone()
            best = watch.restore(model, trainer.state.log_history)
            why = f"stopped early, as {counted(config.patience, 'epoch')} brought nothing better on validation; "
            early = why if len(curve) < config.epochs else ""
            say(f"{title}: {early}epoch {best} of {len(curve)} was the best, and its weights are used")
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    os.environ.pop(_MIXED, None) if launched is None else os.environ.update({_MIXED: launched})
    say_shares(curve, title)
    for name in ("checkpoints", "best"):  # in this order: a checkpoint without the best weights is no use
        shutil.rmtree(work / name, ignore_errors=True)
    return curve


class _Trainer(Trainer):  # type: ignore[misc] # transformers ships no types
    def __init__(
        self,
        config: TrainConfig,
        lengths: list[int],
        matching: Matching | None,
        ledger: Ledger,
        trained_for: str,
        fresh: Collection[str],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over rows: there is nothing to count beforehand
        self._config, self._lengths, self._matching, self._ledger = config, lengths, matching, ledger
        self._label_loss, self._packed = OF_OBJECTIVE[trained_for], trained_for == "next-token"
        named = self.model.named_parameters()
        self._fresh = {id(each) for name, each in self.model.named_parameters() if name in fresh}
        self._of_student = [each for name, each in named if each.requires_grad and not name.startswith("matching.")]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        terms = self._terms(model, inputs)
        loss = total(terms)
        if len(terms) > 1 and self._is_measured(self.state.global_step):
            self._ledger.add_shares(gradient_shares(terms, self._of_student))
        self._ledger.add(self.state.global_step + 1, terms, loss)
        return loss

    def create_optimizer(self, *models: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*models)
        for group in list(optimizer.param_groups):
            if new := [each for each in group["params"] if id(each) in self._fresh]:
                group["params"] = [each for each in group["params"] if id(each) not in self._fresh]
                optimizer.add_param_group({**group, "params": new, "lr": group["lr"] * _FRESH_RATE})
        return optimizer

    def _terms(self, model: Any, inputs: dict[str, Tensor]) -> list[Term]:
        labels, teacher_logits = inputs.pop("labels"), inputs.pop("teacher_logits", None)
        places = inputs.pop("places", None)
        progress = self.state.global_step / max(1, self.state.max_steps - 1)
        alpha = value_at(self._config.alpha, progress)
        losses = {name: value_at(weight, progress) for name, weight in self._config.losses.items()}
        temperature = value_at(self._config.temperature, progress)
        outputs = model(**inputs, **(self._matching.flags if self._matching else {}))
        logits = outputs.logits
        if places is not None:  # a text has several answers, at these tokens: take each as a row of its own
            of, word = (places >= 0).nonzero(as_tuple=True)
            logits, labels = logits[of, places[of, word]], labels[of, word]
            teacher_logits = None if teacher_logits is None else teacher_logits[of, word]
        terms = objective(
            logits,
            labels,
            teacher_logits,
            losses,
            temperature=temperature,
            alpha=alpha,
            hard=self._label_loss,
            packed=self._packed,
        )
        if self._matching:
            of_layers = self._matching(inputs, outputs)
            terms += [Term(name, alpha * losses[name], size) for name, size in of_layers.items()]
        return terms

    def _is_measured(self, step: int) -> bool:
        """Return whether to measure gradients: every 200 steps or more, at an epoch's start; always in the last."""
        a_pass: int = max(1, self.state.max_steps // self._config.epochs)
        epoch, place = divmod(step, a_pass)
        return place == 0 and (epoch % -(-_SHARES_EVERY // a_pass) == 0 or epoch == self._config.epochs - 1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return ByLength(self._lengths, self.args.train_batch_size, self._config.seed)


class ByLength(Sampler[int]):
    """A random order every epoch with batches of similar length, so that little is padding.

    Rows are shuffled, cut into pools of 50 batches, sorted by length inside each pool, and the batches are shuffled
    again. The order is a function of seed and epoch alone: a resumed training sees the same one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random, size = np.random.default_rng([self._seed, self._epoch]), self._batch_size
        shuffled = random.permutation(len(self._lengths))
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), 50 * size):
            pool = shuffled[start : start + 50 * size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")].tolist()
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        rest = [batches.pop()] if batches and len(batches[-1]) < size else []
        random.shuffle(batches)
        for batch in batches + rest:
            yield from batch


# transformers 5 takes a count or a fraction by one name; in 4.57 that name is a count.
_WARMUP = "warmup_ratio" if "warmup_ratio" in TrainingArguments.__dataclass_fields__ else "warmup_steps"


def _arguments(config: TrainConfig, folder: Path, looks_inside: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        **{_WARMUP: 0.1},  # a fraction of the steps
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=config.seed,
        logging_strategy="epoch",
        save_strategy="no",  # Watch asks for checkpoints, by time
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,  # it waits for the device at every step; Ledger looks every 50
        report_to=[],
        bf16=config.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
    )
    if looks_inside:  # projections are used outside the model's forward, where no search for unused ones finds them;
        arguments.ddp_find_unused_parameters = False
        arguments._n_gpu = min(1, arguments.n_gpu)  # and threads with a copy of the model each would share its hooks
    return arguments


def _layer_losses(config: TrainConfig, soft_targets: Array | None) -> list[str]:
    """Return the losses of layers in use; raise SpecError if nothing would teach the head."""
    if soft_targets is None or config.alpha == 0:
        return []
    layers = [name for name in OF_LAYERS if name in config.losses]
    if len(layers) == len(config.losses) and config.alpha == 1:
        raise SpecError(
            f"distill.loss: with alpha 1 and {', '.join(layers)} alone nothing teaches the student to answer",
            "Add kl, or lower alpha",
        )
    return layers


def _judge(
    task: Task, validation: Rows, targets: Array | None
) -> tuple[Callable[[PreTrainedModel], float] | None, bool]:
    """Return the validation metric of a model, and whether higher is better.

    It is the task's metric on labelled rows; agreement with the targets where there are none; else None.
    """
    labelled = [row for row in validation if row.get("label") is not None]
    read: Rows
    good: Callable[[Array], float]
    if labelled:
        read, good = labelled, lambda logits: metric(task, logits, labelled)
    elif targets is not None and len(validation):
        read, good = validation, lambda logits: float(task.agrees(logits, targets).mean())
    else:
        return None, True

    def judge(model: PreTrainedModel) -> float:
        logits = logits_of(model, task, read)
        return good(logits) if np.isfinite(logits).all() else float("nan")

    return judge, task.metric.higher_is_better or not labelled


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if (path / WHOLE).is_file():
            return str(path)
        shutil.rmtree(path)
    return None
