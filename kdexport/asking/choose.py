"""Which texts to ask next: those of which a committee of quick first students is unsure.

The first student is a linear head on frozen vectors of the texts. Heads that saw other bootstrap samples of the answers
differ where the answers do not settle the matter (query by committee: Seung, Opper and Sompolinsky 1992).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdexport.data.demo import located
from kdexport.distill.teacher import save_embedder
from kdexport.models.embedder import student_pooling
from kdexport.models.inference import logits_of
from kdexport.models.registry import open_to_read
from kdexport.progress import bar
from kdexport.tasks import load_task
from kdexport.tasks.config import Function, Row
from kdexport.tasks.metrics import Array

_HEADS, _STEPS, _PENALTY = 4, 20, 1.0
_FIRST, _ROUNDS, _LEAST = 1_000, 8, 16
_STILL, _SURE, _GAIN = 3, 1.0, 0.005


def vectors(base: str, rows: Sequence[Row], length: int, out: Path) -> Array:
    """Return the vectors of texts by the model that students are made from, float32 [N, D].

    Of a pair they are both texts' vectors with their difference and product. The model is written to `out`.
    """
    source = located(base)
    save_embedder(source, length, out, student_pooling(source))
    model, task = open_to_read(out, "float32", all_devices=False), load_task(out)
    sides = ["text", "text_pair"] if any(row.get("text_pair") for row in rows) else ["text"]
    texts = list({row.get(side) or "": None for side in sides for row in rows})
    with bar("vectors of texts", len(texts)) as advance:
        found = logits_of(model, task, [{"text": text} for text in texts], advance=advance)
    place = {text: i for i, text in enumerate(texts)}
    first, *second = (found[[place[row.get(side) or ""] for row in rows]] for side in sides)
    if not second:
        return np.asarray(first)
    return np.concatenate([first, second[0], np.abs(first - second[0]), first * second[0]], axis=1)


class Committee:
    """Linear heads on vectors; the first sees every answer, each other one a bootstrap sample of them."""

    def __init__(self, function: Function = "softmax", seed: int = 0, heads: int = _HEADS) -> None:
        self._softmax, self._seed, self._heads = function == "softmax", seed, heads

    def fit(self, x: Array, targets: Array) -> Self:
        """Fit to vectors [n, D] and the teacher's probabilities [n, C], by L-BFGS from zero."""
        n, classes = targets.shape
        self._mean, self._scale = x.mean(axis=0), x.std(axis=0) + 1e-6
        inputs, wanted = self._standard(x), torch.from_numpy(np.asarray(targets, np.float32))
        draw = np.random.default_rng(self._seed)
        counts = np.stack([np.ones(n), *draw.multinomial(n, np.full(n, 1 / n), self._heads)]).astype(np.float32)
        weights = torch.zeros(inputs.shape[1], len(counts) * classes, requires_grad=True)
        of_row = torch.from_numpy(counts)
        optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> Any:
            optimizer.zero_grad()
            logits = (inputs @ weights).view(n, -1, classes).transpose(0, 1)
            if self._softmax:
                each = -(wanted * functional.log_softmax(logits, dim=-1)).sum(dim=-1)
            else:
                each = functional.binary_cross_entropy_with_logits(
                    logits, wanted.expand_as(logits), reduction="none"
                ).sum(dim=-1)
            found = (of_row * each).sum() / n + _PENALTY / (2 * n) * weights[:-1].square().sum()
            found.backward()
            return found

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        self._weights, self._classes = weights.detach(), classes
        return self

    @torch.inference_mode()
    def probabilities(self, x: Array) -> Array:
        """Return each head's probabilities, float32 [M, n, C]."""
        logits = (self._standard(x) @ self._weights).view(len(x), -1, self._classes).transpose(0, 1)
        return (logits.softmax(dim=-1) if self._softmax else logits.sigmoid()).numpy()

    def doubt(self, x: Array) -> Array:
        """Return how small the margin is between the two best labels of each text, or of a label and none: float [n].

        The margin is of the heads' mean, so it is small as well where they differ.
        """
        mean = self.probabilities(x).mean(axis=0)
        if not self._softmax:
            return np.asarray(1 - np.abs(2 * mean - 1).min(axis=1))
        best = np.partition(mean, -2, axis=1)[:, -2:]
        return np.asarray(1 - (best[:, 1] - best[:, 0]))

    def agrees(self, x: Array, logits: Array) -> Array:
        """Return for each text whether the first head has the teacher's answer: bool [n]."""
        ours = self.probabilities(x)[0]
        if self._softmax:
            return np.asarray(ours.argmax(axis=1) == logits.argmax(axis=1))
        return np.asarray(((ours > 0.5) == (logits > 0)).all(axis=1))

    def _standard(self, x: Array) -> Tensor:
        scaled = ((x - self._mean) / self._scale).astype(np.float32)
        return torch.from_numpy(np.concatenate([scaled, np.ones((len(x), 1), np.float32)], axis=1))


class Places(NamedTuple):
    """Places in the pool to ask next, int [k] each: texts of which the committee is unsure, and random ones."""

    chosen: Array
    random: Array


def next_places(
    committee: Committee, x_pool: Array, count: int, random_share: float, draw: np.random.Generator
) -> Places:
    """Return the places of up to `count` texts of the pool, the random ones a given share of them."""
    count = min(count, len(x_pool))
    by_chance = draw.permutation(len(x_pool))[: round(random_share * count)]
    left = np.setdiff1d(np.arange(len(x_pool)), by_chance)
    unsure = np.argsort(-committee.doubt(x_pool[left]), kind="stable")
    return Places(left[unsure[: count - len(by_chance)]], by_chance)


def agreement(committee: Committee, x_validation: Array, logits: Array) -> float:
    """Return the fraction of validation rows to which the first student gives the teacher's answer."""
    return float(committee.agrees(x_validation, logits).mean())


def first_and_step(budget: int, texts: int) -> tuple[int, int]:
    """Return how many random texts are asked first, and how many in each round after them."""
    most = min(budget, texts)
    first = max(1, min(_FIRST, most // 3))
    return first, max(_LEAST, math.ceil((most - first) / _ROUNDS))


def is_flat(curve: Sequence[float], rows: int) -> bool:
    """Return whether the agreement on so many validation rows has surely stopped to rise.

    The best of the last rounds is no better than before them by half a point, even with the noise that is in favour of
    it: so with few validation rows it never is.
    """
    if len(curve) <= _STILL:
        return False
    before, since = max(curve[:-_STILL]), max(curve[-_STILL:])
    noise = _SURE * math.sqrt(max(before * (1 - before), 1 / rows) / rows)
    return since - before + noise < _GAIN
