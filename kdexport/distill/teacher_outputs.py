"""A teacher's outputs: each text is computed once, ever, and once for every pass."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kdexport import ranks, spec
from kdexport.distill.augment import Change, changer
from kdexport.distill.combine import combine
from kdexport.distill.store import Store, cache_folder, content_key, content_keys, targets_folder
from kdexport.distill.stored import place_of
from kdexport.distill.teachers import EMBEDDER, TeacherFolder
from kdexport.distill.zero_shot import NLI, ZeroShot
from kdexport.errors import ModelError, RunError
from kdexport.files import digest
from kdexport.models.embedder import STEPS
from kdexport.models.inference import logits_of, run_model
from kdexport.models.registry import open_to_read
from kdexport.progress import bar
from kdexport.runtime.predictor import Predictor, providers
from kdexport.tasks import load_task
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array
from kdexport.tasks.vectors import cosines

Rows = Sequence[dict[str, Any]]
# Rows, and a callback with the number done → logits float32 [N, C].
Run = Callable[[Rows, Callable[[int], None]], Array]

_SHARD_EVERY_S, _SHARD_BYTES = 20.0, 1 << 26
_CHUNK = 1024
_TOGETHER_FROM = 256  # rows; opening the teacher takes every process longer than fewer
_DROPOUT_BATCH = 32  # which rows share a batch decides the noise of each


class Teacher:
    """One teacher of a finished stage as a function of rows, with its outputs in stores.

    `hashes`, sha256 of the stage's files by their path in it, identify them. `run` stands in for the kind's own.
    """

    def __init__(
        self, named: TeacherFolder, hashes: Mapping[str, str], how: spec.Teacher, seed: int, run: Run | None = None
    ) -> None:
        self.named, self.task = named, load_task(named.folder)
        self._how, self._seed = how, seed
        self._identity = {n: hashes[named.prefix + n] for n in _files(named) if named.prefix + n in hashes}
        runs: dict[str, Run] = {
            "torch": self._torch, "onnx": self._onnx, "stored": self._stored, "zero-shot": self._zero_shot,
        }  # fmt: skip
        self._run = run or runs[named.kind]
        self._views: dict[str, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle it without what it opens by itself."""
        opened = {"_model", "_embedder", "_predictor", "_inference", "_plain", "_noisy", "_change"}
        return {name: value for name, value in self.__dict__.items() if name not in opened} | {"_views": {}}

    def count(self, rows: Rows) -> tuple[int, int]:
        """Return the number of texts still to compute, and of all; each pass counts."""
        passes = [(store, np.unique(self._keys(asked), axis=0)) for store, _, asked in self._passes(rows)]
        return sum(int((~store.has(keys)).sum()) for store, keys in passes), sum(len(keys) for _, keys in passes)

    def read(self, rows: Rows, title: str) -> None:
        """Compute what is missing; raise ModelError where logits are not finite, or not in a file of logits."""
        for store, run, asked in self._passes(rows):
            _compute(store, run, asked, self.task, title, self._how.devices == "all")

    def answers(self, rows: Rows) -> Array:
        """Return logits float32 [N, C] of computed rows, by its own labels; passes are combined."""
        passes = [self.task.unpack(store.look_up(self._keys(asked))) for store, _, asked in self._passes(rows)]
        return combine(passes, None, self._how.combine)

    def _keys(self, rows: Rows) -> Array:
        return content_keys(map(self.task.content, rows))

    def _passes(self, rows: Rows) -> Iterator[tuple[Store, Run, Rows]]:
        """Yield each pass: the store of its logits, what computes them, and the rows that it reads."""
        if self._how.passes > 1 and self._how.noise == "dropout":
            for i, store in enumerate(self._noisy):
                yield store, partial(self._dropout, i), rows
        else:
            yield self._plain, self._run, rows
            for i in range(self._how.passes - 1):
                yield self._plain, self._run, self._changed(rows, i)

    # --- stores

    @cached_property
    def _plain(self) -> Store:
        if self.named.kind == "stored":
            return Store(self.named.folder / "logits", self._dtype)
        return self._cached(self._identity, *self._rounded)

    @cached_property
    def _noisy(self) -> list[Store]:
        noise = ["dropout", self._seed]
        return [self._cached(self._identity, *noise, i, *self._rounded) for i in range(self._how.passes)]

    @property
    def _rounded(self) -> list[str]:
        return [] if self._how.dtype == "float32" else [self._how.dtype]

    def _cached(self, *identity: object) -> Store:
        what = identity if len(identity) > 1 else identity[0]
        return Store(targets_folder(digest(what)[:32]), self._dtype, optional=True)

    @property
    def _dtype(self) -> np.dtype:
        nothing = self.task.pack(np.empty((0, *self.task.answer_shape), np.float32))
        return np.dtype((nothing.dtype, nothing.shape[1:]))

    # --- passes

    def _changed(self, rows: Rows, i: int) -> Rows:
        """Return the rows with their i-th augmented text; the text itself where there are fewer."""
        texts = list(dict.fromkeys(row["text"] for row in rows if row["text"] not in self._views))
        if texts:
            self._views |= zip(texts, self._change(texts), strict=True)
        return [row | {"text": views[i]} if i < len(views := self._views[row["text"]]) else row for row in rows]

    @cached_property
    def _change(self) -> Change:
        return changer(self.named.folder, spec.Augment(views=self._how.passes - 1), self._seed)

    def _dropout(self, i: int, rows: Rows, advance: Callable[[int], None]) -> Array:
        """MC dropout, which is left on (Gal and Ghahramani 2016, https://arxiv.org/abs/1506.02142)."""
        model, first = self._model, f"{self._seed}:{i}:{self.task.content(rows[0])}"
        if not any(part.p for part in model.modules() if isinstance(part, nn.Dropout)):
            what = "the teacher has no dropout that could tell its passes apart"
            raise ModelError(what, "Take teacher.noise: augment")
        model.train()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):  # its statistics are learned in training, not noise
                part.eval()
        with torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(content_key(first)[:7], "big"))
            logits = run_model(model, self.task, rows, _DROPOUT_BATCH, advance)
        model.eval()
        return logits

    # --- kinds

    @cached_property
    def _model(self) -> Any:
        return open_to_read(self.named.folder, self._how.dtype, all_devices=self._how.devices == "all")

    @cached_property
    def _embedder(self) -> tuple[Any, Task]:
        folder = self.named.folder / EMBEDDER
        return open_to_read(folder, self._how.dtype, all_devices=False), load_task(folder)

    def _cosines(self, rows: Rows, advance: Callable[[int], None]) -> Array:
        """Return the cosine of each row's query and passage, [N, 1], from the vectors of each text once."""
        model, task = self._embedder
        sides = [
            [{"text": row[side], "prompt": prompt} for row in rows]
            for side, prompt in (("text", "query"), ("text_pair", "document"))
        ]
        texts = {task.content(one): one for side in sides for one in side}
        vectors = dict(zip(texts, logits_of(model, task, list(texts.values())), strict=True))
        first, second = (np.stack([vectors[task.content(one)] for one in side]) for side in sides)
        advance(len(rows))
        return cosines(first, second)[:, None]

    def _torch(self, rows: Rows, advance: Callable[[int], None]) -> Array:
        if (self.named.folder / EMBEDDER).is_dir():
            return self._cosines(rows, advance)
        known = [self.task.known(row) for row in rows]
        asked = [row for row, logits in zip(rows, known, strict=True) if logits is None]
        answers = logits_of(self._model, self.task, asked, advance=advance) if asked else ()
        if len(asked) == len(rows):
            return np.asarray(answers)
        advance(len(rows) - len(asked))
        left = iter(answers)
        return np.stack([next(left) if logits is None else logits for logits in known])

    @cached_property
    def _predictor(self) -> Predictor:
        device = "cuda" if "CUDAExecutionProvider" in providers() else "cpu"
        return Predictor(self.task, self.named.folder / "model.onnx", device=device)

    def _onnx(self, rows: Rows, advance: Callable[[int], None]) -> Array:
        logits = self._predictor.logits(rows)
        advance(len(rows))
        return logits

    @cached_property
    def _inference(self) -> ZeroShot:
        return ZeroShot(self.named.folder, self._how.dtype, all_devices=self._how.devices == "all")

    def _zero_shot(self, rows: Rows, advance: Callable[[int], None]) -> Array:
        return self._inference.logits(rows, advance)

    def _stored(self, rows: Rows, advance: Callable[[int], None]) -> Array:
        raise ModelError(
            f"teacher {self.named.model} has no logits for {place_of(rows[0])}", "Store logits for every row"
        )


def _files(named: TeacherFolder) -> list[str]:
    """Return the files that decide a teacher's outputs."""
    if named.kind == "zero-shot":
        return sorted(path.relative_to(named.folder).as_posix() for path in (named.folder / NLI).iterdir())
    patterns = {"torch": ["*.safetensors", "config.json", *STEPS], "onnx": ["model.onnx*"], "stored": []}[named.kind]
    found = [path for pattern in patterns for path in sorted(named.folder.glob(pattern))]
    weights = [path.relative_to(named.folder).as_posix() for path in found]
    return [*weights, "tokenizer.json", "task.json"] if weights else []


def _compute(store: Store, run: Run, rows: Rows, task: Task, title: str, one_a_machine: bool = False) -> None:
    """Run what is missing, the longest texts first; many rows are dealt to all processes."""
    missing = _missing(store, rows, task)
    if ranks.size() == 1 or len(missing) <= _TOGETHER_FROM:
        _add(store, run, rows, missing, task, title)
        return
    fix = "Set KDEXPORT_CACHE to a folder that all machines share, with room"
    ranks.check_shared(cache_folder(), "the cache", fix)
    _add_dealt(store, run, rows, missing, task, title, one_a_machine)

    def all_there() -> bool:
        store.refresh()
        return not _missing(store, rows, task)

    if not ranks.seen(all_there):
        raise RunError(f"soft targets of other processes are not in the cache {cache_folder()}", fix)


@ranks.together
def _add_dealt(
    store: Store, run: Run, rows: Rows, places: Sequence[int], task: Task, title: str, one_a_machine: bool
) -> None:
    # Which texts share a chunk decides the noise of dropout.
    chunk = _CHUNK if isinstance(run, partial) else task.at_once
    _add(store, run, rows, ranks.share(places, chunk, one_a_machine), task, title)
    ranks.gathered(None)


def _add(store: Store, run: Run, rows: Rows, places: Sequence[int], task: Task, title: str) -> None:
    """Add the logits of the rows at these places, a shard every 20 s."""
    done, outputs, written = 0, list[Array](), time.monotonic()
    if not places:
        return
    with bar(title, len(places)) as advance:
        for start in range(0, len(places), _CHUNK):
            chunk = [rows[i] for i in places[start : start + _CHUNK]]
            logits = run(chunk, advance)
            if not np.isfinite(logits).all():
                bad = chunk[int(np.isfinite(logits.reshape(len(logits), -1)).all(axis=1).argmin())]
                raise ModelError(f"the teacher's logits for {place_of(bad)} are not finite")
            outputs.append(task.pack(logits))
            if _is_due(outputs, written) or start + _CHUNK >= len(places):
                count = sum(map(len, outputs))
                keys = content_keys(task.content(rows[i]) for i in places[done : done + count])
                store.add(keys, np.concatenate(outputs))
                done, outputs, written = done + count, [], time.monotonic()


def _missing(store: Store, rows: Rows, task: Task) -> list[int]:
    """Return the places of the first row of each content that the store lacks, the longest content first."""
    sizes, keys = np.empty(len(rows), np.int64), bytearray()
    for i, content in enumerate(map(task.content, rows)):
        sizes[i] = len(content)
        keys += content_key(content)
    distinct, first = np.unique(np.frombuffer(keys, np.uint64).reshape(-1, 2), axis=0, return_index=True)
    places = np.sort(first[~store.has(distinct)])
    order: list[int] = places[np.argsort(-sizes[places], kind="stable")].tolist()
    return order


def _is_due(outputs: Sequence[Array], written: float) -> bool:
    return time.monotonic() - written > _SHARD_EVERY_S or sum(each.nbytes for each in outputs) > _SHARD_BYTES
