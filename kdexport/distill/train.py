"""Training of a model, teacher or student, with the Transformers `Trainer` and our loss.

Mixed precision, several processes (`torchrun`, `accelerate launch`), gradient clipping and checkpoints are
the Trainer's. Ours are the loss, the order of rows, and that a killed training resumes to the same weights.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdexport.distill.losses import UNLABELLED, objective, total, value_at
from kdexport.progress import bar
from kdexport.spec import Schedule, Weight
from kdexport.tasks import Task
from kdexport.tasks.metrics import Array

# A checkpoint holds weights and optimizer: three times the model. Losing this much work is cheaper than more.
CHECKPOINT_EVERY_S = 20.0

Rows = Sequence[dict[str, Any]]
Curve = list[dict[str, float]]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is trained.

    What is optimised, with soft targets: alpha · Σ weight · loss + (1 − alpha) · cross-entropy with the labels.
    `alpha` is λ in many textbooks: how much the teacher's word counts against the labels'. Losses of softened
    probabilities are multiplied by T², which keeps their gradients at one size whatever T is; so `temperature`
    changes what is learned from the teacher, `alpha` alone how much. Without soft targets it is the cross-entropy.

    A `Schedule` moves linearly from the first step to the last of all that are planned. Without `patience` the last
    epoch's weights stand; with it, training ends after so many epochs without a better validation metric, and the
    best epoch's weights stand.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    losses: dict[str, Weight] = msgspec.field(default_factory=lambda: {"kl": 1.0})
    temperature: float | Schedule = 1.0
    alpha: float | Schedule = 0.0
    patience: int | None = None


def fit(
    model: PreTrainedModel,
    task: Task,
    rows: Rows,
    soft_targets: Array | None,
    recipe: Recipe,
    *,
    validation: Rows,
    work: Path,
    title: str,
    teacher: Path | None = None,
    kept: Array | None = None,
    validation_targets: Array | None = None,
) -> Curve:
    """Train a model in place.

    Args:
        model: a sequence classifier; its logits are [B, C].
        task: encodes the rows.
        rows: training rows; those without a label (None) learn from the teacher alone.
        soft_targets: the teacher's logits float [N, C] for those rows, or None for the labels alone.
        recipe: how to train.
        validation: rows whose metric is taken after every epoch; it is recorded, not optimised.
        work: a folder for checkpoints; a call with the same arguments goes on from the last one.
        title: what the progress bar says.
        teacher: its folder, for losses of layers.
        kept: int64 [V], the teacher's token id of each of the model's, where its vocabulary was trimmed.
        validation_targets: the teacher's logits float [N, C] for `validation`, for the metric where it has no labels.

    Returns:
        One record an epoch: `epoch`, `loss` (mean over its steps), `validation` (the task's metric).
    """
    encoded = task.tokenize(rows)
    labels = labels_of(task, rows)
    examples = [
        arrays | {"labels": label} | ({} if soft_targets is None else {"teacher_logits": soft_targets[i]})
        for i, (arrays, label) in enumerate(zip(encoded, labels, strict=True))
    ]
    checkpoints = work / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        warmup_ratio=0.1,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=recipe.seed,
        logging_strategy="epoch",
        save_strategy="no",  # _Watch asks for checkpoints, by time
        save_total_limit=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,  # it waits for the device at every step
        report_to=[],
    )
    trainer = _Trainer(
        recipe,
        [len(next(iter(arrays.values()))) for arrays in encoded],
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=lambda batch: _collate(task, batch),
    )
    trainer.remove_callback(PrinterCallback)
    steps = recipe.epochs * -(-len(examples) // recipe.batch_size)
    with bar(title, steps) as advance:
        trainer.add_callback(_Watch(task, validation, advance))
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    curve = _curve(trainer.state.log_history)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return curve


def labels_of(task: Task, rows: Rows) -> Array:
    """The rows' labels as indices int64 [N], `UNLABELLED` where a row has none."""
    labels = np.full(len(rows), UNLABELLED, dtype=np.int64)
    known = [i for i, row in enumerate(rows) if row.get("label") is not None]
    labels[known] = task.targets([rows[i] for i in known])
    return labels


def logits_of(
    model: PreTrainedModel,
    task: Task,
    rows: Rows,
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Array:
    """A model's logits float32 [N, C], computed in batches of similar length, returned in the rows' order."""
    encoded = task.tokenize(rows)
    lengths = [len(next(iter(arrays.values()))) for arrays in encoded]
    order = np.argsort(lengths, kind="stable")[::-1]  # the longest first: memory runs out at once or never
    logits = np.empty((len(rows), len(task.labels)), dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = task.collate([encoded[i] for i in chosen])
            inputs = {name: torch.from_numpy(array).to(model.device) for name, array in batch.items()}
            logits[chosen] = model(**inputs).logits.float().cpu().numpy()
            if advance:
                advance(len(chosen))
    model.train(was_training)
    return logits


class _Trainer(Trainer):  # type: ignore[misc] # transformers ships no types
    def __init__(self, recipe: Recipe, lengths: list[int], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._recipe, self._lengths = recipe, lengths

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs.pop("labels")
        teacher_logits = inputs.pop("teacher_logits", None)
        outputs = model(**inputs)
        progress = self.state.global_step / max(1, self.state.max_steps - 1)
        terms = objective(
            outputs.logits,
            labels,
            teacher_logits,
            {name: value_at(weight, progress) for name, weight in self._recipe.losses.items()},
            temperature=value_at(self._recipe.temperature, progress),
            alpha=value_at(self._recipe.alpha, progress),
        )
        loss = total(terms)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return ByLength(self._lengths, self.args.train_batch_size, self._recipe.seed)


class ByLength(Sampler[int]):
    """A new random order every epoch in which neighbours are of similar length, so that little is padding.

    Rows are shuffled, cut into pools of 50 batches, sorted by length inside each pool, and the batches are
    shuffled again. The order is a function of seed and epoch alone: a resumed training sees the same one.
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
        random = np.random.default_rng([self._seed, self._epoch])
        shuffled = random.permutation(len(self._lengths))
        pool = 50 * self._batch_size
        batches = [
            sorted_pool[i : i + self._batch_size]
            for start in range(0, len(shuffled), pool)
            for sorted_pool in [_sorted_by(self._lengths, shuffled[start : start + pool])]
            for i in range(0, len(sorted_pool), self._batch_size)
        ]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        random.shuffle(full)
        rest = [batch for batch in batches if len(batch) < self._batch_size]  # at most one, so it comes last
        for batch in full + rest:
            yield from batch.tolist()


def _sorted_by(lengths: Array, chosen: Array) -> Array:
    return np.asarray(chosen[np.argsort(lengths[chosen], kind="stable")])


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Advance the bar each step; each epoch, take the validation metric and see if a checkpoint is due."""

    def __init__(self, task: Task, validation: Rows, advance: Callable[[int], None]) -> None:
        self._task, self._validation, self._advance = task, validation, advance
        self._saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        logits = logits_of(model, self._task, self._validation)
        metric = float(self._task.hits(logits, self._validation).mean())
        state.log_history.append({"epoch": state.epoch, "validation": metric})
        if time.monotonic() - self._saved >= CHECKPOINT_EVERY_S:
            control.should_save = True
            self._saved = time.monotonic()


def _collate(task: Task, examples: list[dict[str, Array]]) -> dict[str, Tensor]:
    batch = {name: torch.from_numpy(array) for name, array in task.collate(examples).items()}
    batch["labels"] = torch.tensor(np.array([example["labels"] for example in examples]))
    if "teacher_logits" in examples[0]:
        batch["teacher_logits"] = torch.from_numpy(np.stack([e["teacher_logits"] for e in examples]))
    return batch


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is complete: its state file is written last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            msgspec.json.decode((path / "trainer_state.json").read_bytes())
            return str(path)
        except (OSError, msgspec.DecodeError):
            shutil.rmtree(path)
    return None


def _curve(history: list[dict[str, Any]]) -> Curve:
    epochs: dict[int, dict[str, float]] = {}
    for record in history:
        point = epochs.setdefault(round(record["epoch"]), {"epoch": round(record["epoch"])})
        point |= {key: round(float(record[key]), 6) for key in ("loss", "validation") if key in record}
    return list(epochs.values())
