"""Train a model, teacher or student, with the Transformers `Trainer` and our loss.

Mixed precision, gradients of several processes, their clipping, and checkpoints are the Trainer's. Ours are the loss,
the order of rows, which no number of processes changes, and that a resumed training ends with the same weights.
"""

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdexport import ranks
from kdexport.analysis.duplicates import keys_of
from kdexport.distill.layer_losses import Matching, matched
from kdexport.distill.losses import OF_OBJECTIVE, Term, objective, total, value_at
from kdexport.distill.monitor import WHOLE, Curve, Ledger, Watch, curve_of, gradient_shares, say_shares
from kdexport.distill.order import ByLength, Parts
from kdexport.distill.targets import SoftTargets
from kdexport.errors import SpecError, counted
from kdexport.models.inference import logits_of, tokenized
from kdexport.progress import bar, say
from kdexport.spec import Schedule, Weight
from kdexport.tasks.base import Task
from kdexport.tasks.config import Arrays
from kdexport.tasks.inputs.media import cached, taken
from kdexport.tasks.inputs.ragged import MANY
from kdexport.tasks.judging import metric
from kdexport.tasks.menus import OF_LAYERS
from kdexport.tasks.metrics import Array

CHECKPOINT_EVERY_S = 20.0  # one holds weights and optimizer, three times the model

Rows = Sequence[dict[str, Any]]

# Weights that begin at random, most often a head, learn so many times as fast as trained ones: docs/decisions.md.
_FRESH_RATE = 10.0

_SHARES_EVERY = 200  # steps; measuring them costs one more backward pass a term


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Hyper-parameters of a training; see `losses` for the objective.

    A `Schedule` moves linearly from the first planned step to the last. Without `patience` the last epoch's weights are
    used; with it, training stops after so many epochs without a better validation metric, and the best epoch's are. A
    step's `batch_size` rows are dealt to the processes, and each takes its part in `accumulate` passes. With `dtype`
    bfloat16, matrix products are in half precision and weights stay float32.
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
    accumulate: int = 1
    checkpoint_gradients: bool = False
    compile: bool = False


@ranks.together
def fit(
    model: PreTrainedModel,
    task: Task,
    rows: Rows,
    soft_targets: SoftTargets | Array | None,
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
        soft_targets: the teacher's logits float [N, *answer_shape] for `rows`, in memory or on disk; None trains on
            labels alone.
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
    judge, higher_is_better, judged = _judge(task, validation, validation_targets)
    if config.patience is not None and judge is None:
        raise SpecError(
            "distill.patience needs a metric, and the validation rows have neither labels nor soft targets", "Remove it"
        )
    encoded = tokenized(task, rows) if encoded is None else encoded
    labels = task.label_array(rows) if len(rows) <= MANY else None
    lengths = task.sizes(encoded)
    groups = keys_of(rows, task.unit) if task.together else None

    def collate(chosen: list[int]) -> dict[str, Tensor]:
        read = taken(encoded, chosen)
        of_rows = task.batch_labels([rows[i] for i in chosen], read) if labels is None else labels[chosen]
        batch = task.collate(read) | {"labels": of_rows}
        if soft_targets is not None:
            batch["teacher_logits"] = soft_targets[chosen]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    processes = ranks.part()[1]
    if (parts := processes * config.accumulate) > 1:
        dealt = f"{config.batch_size} rows a step, {config.batch_size // parts} a pass"
        of = f"{counted(processes, 'process', 'processes')}, {counted(config.accumulate, 'pass', 'passes')} each"
        say(f"{title}: {dealt}: {of}; learning rate {config.learning_rate:g}")
    if config.checkpoint_gradients:
        _checkpoint_gradients(model)
    # What transformers leaves ends with this training: variables of the environment, and the model's forward wrapped.
    launched = _accelerates()
    ledger = Ledger(config.learning_rate)
    torch.manual_seed(config.seed)  # for projections of layers
    attached = matched(model, teacher, layers, token_ids, task=task, rows=rows[:100]) if teacher and layers else None
    with (
        attached or nullcontext() as matching,
        cached(work, encoded, judged),
        bar(title, config.epochs * -(-len(rows) // config.batch_size)) as advance,
    ):
        trainer = _Trainer(
            config,
            ByLength(lengths, config.batch_size, config.seed, groups),
            matching,
            ledger,
            task.objective,
            fresh,
            model=model,
            args=_arguments(config, work / "checkpoints", parts, bool(layers)),
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
        trainer.train(resume_from_checkpoint=ranks.agreed(lambda: _last_checkpoint(work / "checkpoints")))
        curve = curve_of(trainer.state.log_history)
        if config.patience is not None and ranks.leads():
            best = watch.restore(model, trainer.state.log_history)
            why = f"stopped early, as {counted(config.patience, 'epoch')} brought nothing better on validation; "
            early = why if len(curve) < config.epochs else ""
            say(f"{title}: {early}epoch {best} of {len(curve)} was the best, and its weights are used")
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    if config.checkpoint_gradients:
        model.gradient_checkpointing_disable()
    for name in _accelerates().keys() - launched.keys():
        del os.environ[name]
    os.environ.update(launched)
    say_shares(curve, title)
    for name in ("checkpoints", "best") if ranks.leads() else ():  # a checkpoint without the best weights is no use
        if (work / name).exists():  # what can't be removed must not become part of the stage
            shutil.rmtree(work / name)
    return curve


class _Trainer(Trainer):  # type: ignore[misc] # transformers ships no types
    def __init__(
        self,
        config: TrainConfig,
        order: ByLength,
        matching: Matching | None,
        ledger: Ledger,
        trained_for: str,
        fresh: Collection[str],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over rows: there is nothing to count beforehand
        self._config, self._matching, self._ledger = config, matching, ledger
        self._parts = Parts(order, self.args.world_size * config.accumulate)
        if rank := self.args.process_index:  # else the noise of dropout were the same on all
            torch.manual_seed(config.seed + rank)
        self._label_loss, self._packed = OF_OBJECTIVE[trained_for], trained_for == "next-token"
        named = self.model.named_parameters()
        self._fresh = {id(each) for name, each in self.model.named_parameters() if name in fresh}
        self._of_student = [each for name, each in named if each.requires_grad and not name.startswith("matching.")]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        weight = self._parts.weight(len(inputs["labels"]), self.state.global_step)
        terms = self._terms(model, inputs)
        if len(terms) > 1 and self._is_measured(self.state.global_step):
            self._ledger.add_shares(gradient_shares(terms, self._of_student))
        if weight != 1:
            terms = [term._replace(size=term.size * weight) for term in terms]
        loss = total(terms)
        self._ledger.add(self.state.global_step + 1, terms, loss)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Skip a count that nobody reads: it visits every module at every step."""
        return 0

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

    def get_train_dataloader(self) -> Any:
        pin = self.args.dataloader_pin_memory
        rows = DataLoader(self.train_dataset, batch_sampler=self._parts, collate_fn=self.data_collator, pin_memory=pin)
        return self.accelerator.prepare(rows)


# transformers 5 takes a count or a fraction by one name; in 4.57 that name is a count.
_WARMUP = "warmup_ratio" if "warmup_ratio" in TrainingArguments.__dataclass_fields__ else "warmup_steps"


def _arguments(config: TrainConfig, folder: Path, parts: int, looks_inside: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=max(1, config.batch_size // parts),
        gradient_accumulation_steps=config.accumulate,
        torch_compile=config.compile,
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process a device: threads with a copy of the model each are slow
    return arguments


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        what = f"checkpoint_gradients: models of the family {model.config.model_type!r} don't offer it"
        raise SpecError(what, "Remove it, or raise accumulate")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _accelerates() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


def _layer_losses(config: TrainConfig, soft_targets: object) -> list[str]:
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
) -> tuple[Callable[[PreTrainedModel], float] | None, bool, Sequence[Arrays]]:
    """Return the validation metric of a model, whether higher is better, and the encoded rows that it reads.

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
        return None, True, ()
    rank, count = ranks.part()
    own = read[rank::count]
    encoded = tokenized(task, own)

    def judge(model: PreTrainedModel) -> float:
        parts = ranks.gathered(logits_of(model, task, own, encoded=encoded))
        logits = np.empty((len(read), *parts[0].shape[1:]), parts[0].dtype)
        for i, part in enumerate(parts):
            logits[i::count] = part
        return good(logits) if np.isfinite(logits).all() else float("nan")

    return judge, task.metric.higher_is_better or not labelled, encoded


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if (path / WHOLE).is_file():
            return str(path)
        shutil.rmtree(path)
    return None
