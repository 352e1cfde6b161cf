"""Soft targets: the teacher runs over each text once, ever.

Logits are kept by content in a cache that all runs share: one folder a teacher (the hash of its weights,
configuration, tokenizer and maximal length), in it shards of (hash of the text → logits). What is there is
never computed again: not for a second student, not after a kill, not when rows are added. A run's own
`targets/` holds the logits of its own texts, looked up by example and never by step.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from kdexport.data import read_rows
from kdexport.data.sources import SPLITS
from kdexport.errors import ModelError
from kdexport.progress import bar, say, warn
from kdexport.rundir import digest, read_record, write_json
from kdexport.tasks import Task, load_task
from kdexport.tasks.metrics import Array, cohen_kappa, confusion_matrix

Rows = Sequence[dict[str, Any]]
Teacher = Callable[[Rows, Callable[[int], None]], Array]

_PREFLIGHT_ROWS = 256
_CHANCE_KAPPA = 0.1
_SHARD_EVERY_S = 20.0
_CHUNK = 1024


class Store:
    """Content → logits float32 [C], in a folder of shards that only ever grows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logits: dict[bytes, Array] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("*.npz")):
            try:
                with np.load(shard) as arrays:
                    self._logits |= zip(map(bytes, arrays["keys"]), arrays["logits"], strict=True)
            except Exception:  # a shard that a disk lost part of; its texts are computed again
                warn(f"soft targets: {shard} is damaged and is left out")
                shard.unlink()

    def missing(self, contents: Iterable[str]) -> list[str]:
        """The distinct contents that have no logits yet, in order."""
        return [content for content in dict.fromkeys(contents) if content_key(content) not in self._logits]

    def add(self, contents: Sequence[str], logits: Array) -> None:
        """Write one shard, atomically."""
        keys = [content_key(content) for content in contents]
        path = self._folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.npz"
        neighbour = path.with_name(f".{os.getpid()}.tmp")
        with neighbour.open("wb") as file:
            np.savez(file, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), logits=logits)
        neighbour.replace(path)
        self._logits |= zip(keys, logits, strict=True)

    def look_up(self, contents: Iterable[str]) -> Array:
        """Logits float32 [N, C] in the order of the contents."""
        return np.stack([self._logits[content_key(content)] for content in contents])


def content_key(content: str) -> bytes:
    """16 bytes that stand for a content."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def cache_folder() -> Path:
    """`$KDEXPORT_CACHE`, or `kdexport/` in the user's cache folder."""
    if own := os.environ.get("KDEXPORT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdexport"


def write_targets(data: Path, teacher: Path, out: Path, run_teacher: Teacher | None = None) -> None:
    """Write the teacher's logits for every row of every split, and check the teacher on the way.

    Args:
        data: finished data stage.
        teacher: finished teacher stage.
        out: gets `train.npy`, `validation.npy`, `test.npy` (float32 [N, C], in the rows' order) and
            `targets.json`.
        run_teacher: rows → logits; the teacher in PyTorch when absent.

    Raises:
        ModelError: the teacher is near chance on the labelled rows, or gives no finite logits.
    """
    task = load_task(teacher)
    splits = {split: read_rows(data, split) for split in SPLITS}
    files = {name: read_record(teacher).outputs[name] for name in _teacher_files(teacher)}
    store = Store(cache_folder() / "targets" / digest(files)[:32])
    everything = [row for rows in splits.values() for row in rows]
    distinct = {task.content(row): row for row in everything}
    missing = store.missing(distinct)
    sample = _sample([*splits["validation"], *splits["train"]], _PREFLIGHT_ROWS)
    if missing:
        run = run_teacher or _torch_teacher(teacher, task)
        _compute(store, task, sample, run, "soft targets (preflight)")
        _preflight(store, task, sample)
        say(f"soft targets: the teacher reads {len(store.missing(distinct)) + len(sample):,} texts")
        _compute(store, task, list(distinct.values()), run, "soft targets")
    if len(missing) < len(distinct):
        say(f"soft targets: {len(distinct) - len(missing):,} of {len(distinct):,} reused from {cache_folder()}")
    _preflight(store, task, sample)
    accuracy = {}
    for split, rows in splits.items():
        logits = store.look_up(task.content(row) for row in rows)
        np.save(out / f"{split}.npy", logits)
        accuracy[split] = float(task.hits(logits, rows).mean())
    say(f"soft targets: teacher's {task.metric_name} on validation {accuracy['validation']:.2%}")
    write_json(
        out / "targets.json",
        {"texts": len(distinct), "computed": len(missing), "metric": task.metric_name, "teacher": accuracy},
    )


def _compute(store: Store, task: Task, rows: Rows, run: Teacher, title: str) -> None:
    by_content = {task.content(row): row for row in rows}
    missing = sorted(store.missing(by_content), key=len, reverse=True)
    if not missing:
        return
    pending: list[tuple[list[str], Array]] = []
    written = time.monotonic()

    def flush() -> None:
        if pending:
            store.add([c for contents, _ in pending for c in contents], np.concatenate([x for _, x in pending]))
            pending.clear()

    with bar(title, len(missing)) as advance:
        for start in range(0, len(missing), _CHUNK):
            contents = missing[start : start + _CHUNK]
            logits = run([by_content[content] for content in contents], advance)
            if not np.isfinite(logits).all():
                bad = by_content[contents[int(np.argmax(~np.isfinite(logits).all(axis=1)))]]
                raise ModelError(f"the teacher's logits for {bad['id'].replace(':', ', row ')} are not finite")
            pending.append((contents, logits))
            if time.monotonic() - written > _SHARD_EVERY_S:
                flush()
                written = time.monotonic()
        flush()


def _preflight(store: Store, task: Task, rows: Rows) -> None:
    """Refuse a teacher that is near chance, naming the likely cause."""
    logits = store.look_up(task.content(row) for row in rows)
    counts = confusion_matrix(task.targets(rows), logits.argmax(axis=1), len(task.labels))
    if cohen_kappa(counts) >= _CHANCE_KAPPA:
        return
    accuracy = np.trace(counts) / counts.sum()
    found = f"the teacher answers {accuracy:.1%} of {len(rows)} labelled rows rightly, which is near chance"
    truth, answer = linear_sum_assignment(-counts)
    reordered = counts[truth, answer].sum() / counts.sum()
    if reordered > accuracy + 0.2 and cohen_kappa(counts[:, answer]) > 2 * _CHANCE_KAPPA:
        order = [task.labels[i] for i in np.argsort(answer)]
        raise ModelError(
            f"{found}. Its label order is not the data's: read as {', '.join(order[:8])} it answers {reordered:.1%}",
            "Set id2label in its config.json to that order",
        )
    raise ModelError(found, "Is it trained for these labels? To fine-tune it: --teacher-epochs 3")


def _sample(rows: Rows, n: int) -> Rows:
    """Up to n rows, spread evenly."""
    step = max(1, len(rows) // n)
    return rows[::step][:n]


def _teacher_files(teacher: Path) -> list[str]:
    weights = sorted(path.name for path in teacher.glob("*.safetensors"))
    return [*weights, "config.json", "tokenizer.json", "task.json"]


def _torch_teacher(folder: Path, task: Task) -> Teacher:
    import torch
    from transformers import AutoModelForSequenceClassification

    from kdexport.distill.train import logits_of

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return lambda rows, advance: logits_of(model, task, rows, advance=advance)
