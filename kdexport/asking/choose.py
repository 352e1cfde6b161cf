"""Which texts to ask next: those of which a quick first student is unsure, unlike each other.

The first student is a linear head on frozen vectors of the texts. A committee of such heads, each on a bootstrap sample
of the answers, chose no better than one.
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
from kdexport.distill.store import Store, content_keys, targets_folder
from kdexport.distill.teacher import save_embedder
from kdexport.files import digest, hash_files
from kdexport.models.embedder import student_pooling
from kdexport.models.inference import logits_of
from kdexport.models.registry import open_to_read
from kdexport.progress import bar
from kdexport.tasks import load_task
from kdexport.tasks.config import Function, Row
from kdexport.tasks.metrics import Array

_STEPS, _PENALTY = 20, 0.3
_AMONG, _TURNS = 5, 4  # texts in doubt, of which one is chosen; turns of k-means
_FIRST, _ROUNDS, _LEAST = 1_000, 8, 16
_NEARLY_ALWAYS, _ROWS_TO_TELL = 0.97, 30  # of validation rows
_STILL, _SURE, _GAIN = 3, 1.0, 0.005


def vectors(base: str, rows: Sequence[Row], length: int, out: Path) -> Array:
    """Return the vectors of texts by the model that students are made from, float32 [N, D].

    Of a pair they are both texts' vectors with their difference and product. The model is written to `out`; vectors
    are stored in the cache.
    """
    source = located(base)
    save_embedder(source, length, out, student_pooling(source))
    model, task = open_to_read(out, "float32", all_devices=False), load_task(out)
    sides = ["text", "text_pair"] if any(row.get("text_pair") for row in rows) else ["text"]
    texts = list({row.get(side) or "": None for side in sides for row in rows})
    identity = digest(["vectors", hash_files(out)])[:32]
    store, keys = Store(targets_folder(identity), optional=True), content_keys(texts)
    missing = [texts[i] for i in np.flatnonzero(~store.has(keys))]
    if missing:
        with bar("vectors of texts", len(missing)) as advance:
            of_missing = logits_of(model, task, [{"text": text} for text in missing], advance=advance)
        store.add(content_keys(missing), of_missing)
    found = store.look_up(keys)
    place = {text: i for i, text in enumerate(texts)}
    first, *second = (found[[place[row.get(side) or ""] for row in rows]] for side in sides)
    if not second:
        return np.asarray(first)
    return np.concatenate([first, second[0], np.abs(first - second[0]), first * second[0]], axis=1)


class FirstStudent:
    """A linear head on vectors, fitted to the teacher's probabilities within seconds."""

    def __init__(self, function: Function = "softmax") -> None:
        self._softmax = function == "softmax"

    def fit(self, x: Array, targets: Array) -> Self:
        """Fit to vectors [n, D] and probabilities [n, C], by L-BFGS from zero."""
        self._mean, self._scale = x.mean(axis=0), x.std(axis=0) + 1e-6
        inputs, wanted = self._standard(x), torch.from_numpy(np.asarray(targets, np.float32))
        weights = torch.zeros(inputs.shape[1], targets.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")
        loss = functional.cross_entropy if self._softmax else functional.binary_cross_entropy_with_logits

        def backward() -> Any:
            optimizer.zero_grad()
            found = loss(inputs @ weights, wanted) + _PENALTY / (2 * len(x)) * weights[:-1].square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimizer.step(backward)  # type: ignore[no-untyped-call]
        self._weights = weights.detach()
        return self

    @torch.inference_mode()
    def probabilities(self, x: Array) -> Array:
        """Return its probabilities of vectors, float32 [n, C]."""
        logits = self._standard(x) @ self._weights
        return (logits.softmax(dim=-1) if self._softmax else logits.sigmoid()).numpy()

    def doubt(self, x: Array) -> Array:
        """Return how small the margin is between the two best labels of each text, or of a label and none: [n]."""
        found = self.probabilities(x)
        if not self._softmax:
            return np.asarray(1 - np.abs(2 * found - 1).min(axis=1))
        best = np.partition(found, -2, axis=1)[:, -2:]
        return np.asarray(1 - (best[:, 1] - best[:, 0]))

    def agrees(self, x: Array, logits: Array) -> Array:
        """Return for each text whether it has the teacher's answer: bool [n]."""
        ours = self.probabilities(x)
        if self._softmax:
            return np.asarray(ours.argmax(axis=1) == logits.argmax(axis=1))
        return np.asarray(((ours > 0.5) == (logits > 0)).all(axis=1))

    def _standard(self, x: Array) -> Tensor:
        scaled = ((x - self._mean) / self._scale).astype(np.float32)
        return torch.from_numpy(np.concatenate([scaled, np.ones((len(x), 1), np.float32)], axis=1))


class Places(NamedTuple):
    """Places in the pool to ask next, int [k] each: texts of which the first student is unsure, and random ones."""

    chosen: Array
    random: Array


def next_places(
    student: FirstStudent, x_pool: Array, count: int, random_share: float, draw: np.random.Generator
) -> Places:
    """Return the places of up to `count` texts of the pool, the random ones a given share of them.

    The chosen ones are spread over the texts in doubt: one of each cluster (Zhdanov 2019).
    """
    count = min(count, len(x_pool))
    by_chance = draw.permutation(len(x_pool))[: round(random_share * count)]
    left = np.setdiff1d(np.arange(len(x_pool)), by_chance)
    doubt = student.doubt(x_pool[left])
    unsure = np.argsort(-doubt, kind="stable")[: _AMONG * count]
    spread = _spread(x_pool[left[unsure]], doubt[unsure], count - len(by_chance), draw)
    return Places(left[unsure[spread]], by_chance)


def _spread(x: Array, weights: Array, count: int, draw: np.random.Generator) -> Array:
    """Return the places of the vectors nearest to the centres of so many clusters, by weighted k-means of cosines.

    The vectors are in the order of their weights; where a cluster is empty, the first ones take its place.
    """
    if not count:
        return np.zeros(0, np.int64)
    x = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
    centres = x[draw.permutation(len(x))[:count]]
    for _ in range(_TURNS):
        of = (x @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, of, x * weights[:, None])
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.maximum(length, 1e-12), centres)
    near = x @ centres.T
    of = near.argmax(axis=1)
    by_cluster = np.lexsort((-near[np.arange(len(x)), of], of))
    chosen = by_cluster[np.unique(of[by_cluster], return_index=True)[1]]
    others = np.setdiff1d(np.arange(len(x)), chosen)
    return np.concatenate([chosen, others[: count - len(chosen)]])


def agreement(student: FirstStudent, x_validation: Array, logits: Array) -> float:
    """Return the fraction of validation rows to which the first student gives the teacher's answer."""
    return float(student.agrees(x_validation, logits).mean())


def sure_from(student: FirstStudent, x_validation: Array, logits: Array) -> float:
    """Return the least margin of texts to which the first student gives the teacher's answer nearly always.

    It is taken from validation rows, which did not teach it; infinite where there is none.
    """
    margin, right = 1 - student.doubt(x_validation), student.agrees(x_validation, logits)
    surest = np.argsort(-margin, kind="stable")
    shares = np.cumsum(right[surest]) / np.arange(1, len(right) + 1)
    good = np.flatnonzero(shares >= _NEARLY_ALWAYS)
    return float(margin[surest[good[-1]]]) if len(good) and good[-1] + 1 >= _ROWS_TO_TELL else math.inf


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
