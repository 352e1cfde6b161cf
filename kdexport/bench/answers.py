"""All rows through a target, for its accuracy: `python -m kdexport.bench.answers`, JSON in, a .npy file out."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import msgspec
import numpy as np

from kdexport.bench.process import call
from kdexport.bench.subjects import Target, open_target
from kdexport.runtime.predictor import allowed_cores
from kdexport.tasks.metrics import Array

_BATCH = 16


class Question(msgspec.Struct, frozen=True):
    """What to answer; `rows` is a JSON file."""

    target: Target
    rows: str


def logits_of(target: Target, rows: Path) -> Array:
    """Logits [N, C] of every row, in a process of its own, so that a model that falls takes nothing along.

    Raises:
        Crashed: it fell.
    """
    cores = allowed_cores()
    done = call("kdexport.bench.answers", msgspec.json.encode(Question(target, str(rows))), cores)
    return np.asarray(np.load(io.BytesIO(done)))


def main() -> None:
    """Read a question from stdin, write the logits to stdout."""
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    rows = msgspec.json.decode(Path(asked.rows).read_bytes())
    opened = open_target(asked.target, allowed_cores())
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i].get("text", ""))))
    answer = opened.answer or (lambda some: opened.run(opened.encode(some)))
    batches = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
    found = np.concatenate([answer([rows[i] for i in batch]) for batch in batches])
    np.save(sys.stdout.buffer, found[np.argsort(order)])


if __name__ == "__main__":
    main()
