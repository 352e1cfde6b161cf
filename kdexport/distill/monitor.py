"""Monitor a training: the size and gradient of each term, the metric, the best epoch."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainerCallback

from kdexport import ranks
from kdexport.distill.losses import Term
from kdexport.errors import ModelError
from kdexport.files import sync, write_bytes
from kdexport.progress import say, warn

Curve = list[dict[str, float]]
History = list[dict[str, Any]]

WHOLE = "whole"  # is in a checkpoint all of which is on the disk
_LOOK_EVERY = 50  # steps; a look at the losses waits for the device
_ONE_SIDED = 0.99
_CURVE_KEYS = ("loss", "validation", "terms/", "shares/")


class Ledger:
    """The terms of every step, read from the device every 50 steps; the learning rate is for its error's advice."""

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._unread: dict[str, list[Tensor]] = {}
        self._steps: list[int] = []  # of the unread
        self._read: dict[str, list[float]] = {}
        self._shares: dict[str, float] = {}
        self._last_loss = math.nan

    def add(self, step: int, terms: Sequence[Term], loss: Tensor) -> None:
        """Record a pass of step `step`, from 1: unweighted terms and their sum; see `close_epoch` for errors."""
        self._steps.append(step)
        for name, size in [("loss", loss), *((term.name, term.size) for term in terms)]:
            self._unread.setdefault(name, []).append(size.detach())
        if len(self._steps) == _LOOK_EVERY:
            self._look()

    def add_shares(self, shares: dict[str, float]) -> None:
        """Record each term's fraction of the gradient, as measured on one batch of this epoch."""
        self._shares = shares

    def close_epoch(self) -> dict[str, float]:
        """Return the epoch's `terms/NAME` (mean size) and `shares/NAME`; raise ModelError if a loss is not finite."""
        self._look()
        sizes = {f"terms/{name}": sum(read) / len(read) for name, read in self._read.items() if name != "loss"}
        shares = {f"shares/{name}": share for name, share in self._shares.items()}
        self._read, self._shares = {}, {}
        found = ranks.gathered(sizes | shares if len(sizes) > 1 else {})
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}

    def diverged(self, found: str, step: int) -> ModelError:
        """Return the error for losses or outputs that are not finite, with its likely cause."""
        if step == 1:
            return ModelError(f"{found}: the weights that training starts from are not finite", "Look at the model")
        return ModelError(
            f"{found}: training diverged, most likely because its steps are too large",
            f"Lower the learning rate, to {self._learning_rate / 5:.1g} say",
        )

    def _look(self) -> None:
        unread = {name: torch.stack(sizes).tolist() for name, sizes in self._unread.items()}
        steps, self._steps, self._unread = self._steps, [], {}
        for at, loss in zip(steps, unread.get("loss", []), strict=True):
            if not math.isfinite(loss):
                raise self.diverged(f"the loss of step {at} is {loss}, that before was {self._last_loss:.3g}", at)
            self._last_loss = loss
        for name, sizes in unread.items():
            self._read.setdefault(name, []).extend(sizes)


@dataclass(eq=False, kw_only=True)
class Watch(TrainerCallback):  # type: ignore[misc] # transformers ships no types
    """Advance the bar; each epoch, take the metric, save the best weights, and ask for a checkpoint if one is due.

    Decisions follow from the history in the checkpoints alone, so a resumed training decides as one that ran through.
    """

    judge: Callable[[Any], float] | None  # a model's metric; NaN where its outputs are not finite
    ledger: Ledger
    higher_is_better: bool
    patience: int | None  # epochs without a better metric; None never stops, and saves no weights
    folder: Path  # for the best weights
    checkpoint_every_s: float
    advance: Callable[[int], None]
    _saved_at: float = field(default_factory=time.monotonic)
    _best_in_checkpoint: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        if state.global_step:
            self.advance(state.global_step)
        self._best_in_checkpoint = best_epoch(state.log_history, self.higher_is_better)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self.advance(1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: D102
        epoch = round(state.epoch)
        record = {"epoch": state.epoch} | self.ledger.close_epoch()
        if self.judge:
            record["validation"] = metric = self.judge(model)
            if math.isnan(metric):
                raise self.ledger.diverged(f"after epoch {epoch} the answers are not finite", state.global_step)
        state.log_history.append(record)
        if self.patience is not None:
            best = best_epoch(state.log_history, self.higher_is_better) or epoch
            if best == epoch and state.is_world_process_zero:
                self._keep(model, epoch)
            control.should_training_stop |= epoch - best >= self.patience
        # No checkpoint of the epoch that stops it: what goes on from there would not know that it has to stop.
        due = ranks.agreed(lambda: time.monotonic() - self._saved_at >= self.checkpoint_every_s)
        if due and not control.should_training_stop:
            control.should_save = True
            self._saved_at = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self._best_in_checkpoint = best_epoch(state.log_history, self.higher_is_better)
        ranks.gathered(None)  # each process has written its random state
        if not state.is_world_process_zero:
            return
        whole = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for folder in (whole, self.folder):
            if folder.is_dir():
                sync(folder)
        write_bytes(whole / WHOLE, b"")
        # Not by transformers, which goes by their times: a clock that jumps back would make the newest the oldest.
        for path in whole.parent.glob("checkpoint-*"):
            if path != whole:
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, model: nn.Module, history: History) -> int:
        """Load the weights of the best epoch, and return its number."""
        best = best_epoch(history, self.higher_is_better) or 0
        load_model(model, self.folder / f"{best}.safetensors")
        return best

    def _keep(self, model: nn.Module, epoch: int) -> None:
        """Save this epoch's weights, and retain those that a resume from the last checkpoint would need."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(self.folder / "new"))
        (self.folder / "new").replace(self.folder / f"{epoch}.safetensors")
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in (str(epoch), str(self._best_in_checkpoint)):
                path.unlink()


def gradient_shares(terms: Sequence[Term], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """Return the norm of each weighted term's gradient as a fraction of the norms' sum; the graph is retained."""
    norms = {}
    for term in terms:
        found = torch.autograd.grad(term.weight * term.size, parameters, retain_graph=True, allow_unused=True)
        norms[term.name] = torch.stack([g.norm() for g in found if g is not None]).norm().item()
    everything = sum(norms.values()) or 1.0
    return {name: norm / everything for name, norm in norms.items()}


def say_shares(curve: Curve, title: str) -> None:
    """Print each term's last measured fraction of the gradient; warn where one dominates."""
    measured = [found for point in curve if (found := {k[7:]: v for k, v in point.items() if k.startswith("shares/")})]
    if not measured:
        return
    ordered = sorted(measured[-1].items(), key=lambda item: -item[1])
    say(f"{title}: of the gradient, " + ", ".join(f"{name} is {share:.0%}" for name, share in ordered))
    name, share = ordered[0]
    if share > _ONE_SIDED:
        warn(f"{title}: {name} is {share:.1%} of the gradient, the other terms hardly count; lower its weight")


def best_epoch(history: History, higher_is_better: bool = True) -> int | None:
    """Return the first epoch with the best metric, from 1; None while there is none."""
    judged = [record for record in history if "validation" in record]
    best = max if higher_is_better else min
    return round(best(judged, key=lambda record: record["validation"])["epoch"]) if judged else None


def curve_of(history: History) -> Curve:
    """Return one record an epoch: `epoch`, `loss`, `validation`, and of each term `terms/NAME` and `shares/NAME`."""
    epochs: dict[int, dict[str, float]] = {}
    for record in history:
        epochs.setdefault(round(record["epoch"]), {}).update(record)
    return [
        {"epoch": epoch}
        # sorted, because a history that was read from a checkpoint has another order
        | {key: round(float(record[key]), 6) for key in sorted(record) if key.startswith(_CURVE_KEYS)}
        for epoch, record in epochs.items()
    ]
