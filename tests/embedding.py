"""What the tests of students that embed stand on: sentences, scored pairs, and the stages of a run."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from kdexport import spec
from kdexport.data import prepare
from kdexport.distill import teachers
from kdexport.distill.soft_targets import write_targets
from kdexport.distill.student import train_student
from kdexport.stages import Run

TASK = "sentence-embedding"
_WHO = ("the nurse", "a pilot", "my neighbour", "the old teacher", "a small dog", "our cook", "the judge", "a child")
_DOES = ("reads", "carries", "forgets", "buys")
_WHAT = ("a red letter", "the heavy bag", "some cold bread", "an empty box")
_EVERY = np.random.default_rng(0).permutation(list(itertools.product(_WHO, _DOES, _WHAT)))
SENTENCES = [" ".join(parts) for parts in _EVERY[:80]]


def write_texts(folder: Path) -> Path:
    """Write 80 sentences, a line each."""
    (folder / "texts.txt").write_text("\n".join(SENTENCES))
    return folder / "texts.txt"


def write_pairs(folder: Path, name: str = "pairs.csv", *, of_texts: bool = False) -> Path:
    """Write pairs of other sentences, or of the same; a score says how many of three parts they share."""
    some = _EVERY[:80] if of_texts else _EVERY[80:]
    with (folder / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence1", "sentence2", "score"])
        for a, b in zip(some[::2], some[1::2], strict=True):
            rows.writerow([" ".join(a), " ".join(b), f"{5 * (a == b).sum() / 3:.2f}"])
    return folder / name


def given(data: Path, teacher: Path | list[Path], **changes: Any) -> spec.Spec:
    """Return the spec of a short run."""
    model = [str(one) for one in teacher] if isinstance(teacher, list) else str(teacher)
    base = {"task": TASK, "data.train": str(data), "teacher.model": model, "data.max_length": 16}
    return spec.load(None, base | {"distill.epochs": 2, "distill.batch_size": 16} | changes)


def data_stage(run: Path, settings: spec.Spec) -> Path:
    """Make the data stage."""
    with Run(run) as folder:
        return folder.stage(
            "data", version=1, settings=settings.data, reads=[],
            build=lambda work: prepare(settings.data, settings.task, settings.seed, work),
        )  # fmt: skip


def stages(run: Path, settings: spec.Spec, data: Path | None = None) -> tuple[Path, Path, Path]:
    """Make the stages of data, teacher and targets."""
    data = data or data_stage(run, settings)
    with Run(run) as folder:
        teacher = folder.stage(
            "teacher", version=1, settings=teachers.settings_of(settings), reads=[data, *teachers.files(settings)],
            build=lambda work: teachers.prepare_teachers(settings, data, work),
        )  # fmt: skip
        return data, teacher, folder.stage(
            "targets", version=1, settings=teachers.asked_of(settings), reads=[data, teacher],
            build=lambda work: write_targets(data, teacher, work, how=settings.teacher, seed=settings.seed),
        )  # fmt: skip


def train(settings: spec.Spec, name: str, made: tuple[Path, Path, Path], out: Path) -> Path:
    """Train the student of this name into `out`."""
    data, teacher, targets = made
    out.mkdir(exist_ok=True)
    train_student(
        settings.student, name, settings.distill, data=data, teacher=teacher, targets=targets, seed=0, out=out
    )
    return out
