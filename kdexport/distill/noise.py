"""MC dropout: outputs with dropout left on (Gal and Ghahramani 2016, https://arxiv.org/abs/1506.02142)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kdexport.errors import ModelError
from kdexport.models.inference import run_model
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array


def noisy_logits(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[dict[str, Any]],
    seed: int,
    advance: Callable[[int], None],
    batch_size: int = 32,
) -> Array:
    """Logits float32 [N, C] of one pass with dropout; the same rows and seed give the same ones.

    Raises:
        ModelError: the model has no dropout, so every pass would be the same.
    """
    rates = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
    if not any(rates):
        raise ModelError("the teacher has no dropout that could tell its passes apart", "Take teacher.noise: augment")
    model.train()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):  # its statistics are learned in training, not noise
            part.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        logits = run_model(model, task, rows, batch_size, advance)
    model.eval()
    return logits
