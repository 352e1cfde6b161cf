"""Verification: does each exported file do what the student does in PyTorch? No torch here.

The student's logits in PyTorch were written when it was trained (`reference.npy`: the test rows, then the
task's probes). Here every candidate answers the same rows through the predictor, in several shapes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport.analysis import sampled
from kdexport.data import read_rows
from kdexport.errors import VerificationError
from kdexport.export import Candidate, read_candidates
from kdexport.files import write_json
from kdexport.progress import say, warn
from kdexport.results import Metric, Quality
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task, metrics
from kdexport.tasks.base import Generates, Task, can_generate
from kdexport.tasks.config import Row
from kdexport.tasks.judging import AGREEMENT, judged, mcnemar, metric, metric_interval
from kdexport.tasks.metrics import Array, log_softmax
from kdexport.tasks.packed import LOG_P

FP32_TOLERANCE = 1e-4
_SMALL_SHAPE_ROWS = 64


class Validation(msgspec.Struct, frozen=True, omit_defaults=True):
    """`validation.json`: what each file has on the validation split.

    Of vectors also `shared`, the fraction of their nearest in fp32 that they still have, and the `least` for int8.
    """

    metric: metrics.Metric
    values: dict[str, float]
    shared: dict[str, float] = {}
    least: float = 0.0


def verify(data: Path, targets: Path, student: Path, baseline: Path | None, export: Path, out: Path) -> None:
    """Check parity, and take the metric of every model and file on the whole test split.

    Writes `quality.json` (name → `Quality`; `teacher`, `student-torch`, `baseline-torch` and
    `student-<candidate>`), `logits.npz` and `stats.npz` with the logits and the statistics of each row behind it,
    `validation.json` with the metric of the files on the validation split, by which one is chosen, and `members.npz`
    with the logits of the plain files for some of the training rows, which the audit of leakage compares with them.

    Raises:
        VerificationError: the plain fp32 file differs from PyTorch by more than 1e-4 in some logit.
    """
    task = load_task(student)
    rows = read_rows(data, "test")
    reference = np.load(student / "reference.npy")
    logits = {"teacher": np.load(targets / "test.npy"), "student-torch": reference[: len(rows)]}
    by = judged(task, rows, logits["teacher"])
    if baseline:
        logits["baseline-torch"] = np.load(baseline / "reference.npy")[: len(rows)]
    differences: dict[str, float] = {}
    for candidate, found, difference in compare(task, export, [*rows, *task.probes()], reference):
        name = f"student-{candidate.name}"
        logits[name], differences[name] = found[: len(rows)], difference
    quality = {name: judge(by, rows, found, logits["teacher"], differences.get(name)) for name, found in logits.items()}
    np.savez(out / "logits.npz", **{name: found.astype(np.float32) for name, found in logits.items()})
    stats: dict[str, Any] = {name: by.stats(found, rows) for name, found in logits.items()}
    np.savez_compressed(out / "stats.npz", **stats)
    write_json(out / "quality.json", quality)
    train, validation = read_rows(data, "train"), read_rows(data, "validation")
    members = [train[i] for i in sampled(len(train))]
    taught = np.load(targets / "validation.npy")
    answers, values, judging = dict[str, Any](), dict[str, float](), dict[str, Array]()
    for candidate in read_candidates(export):
        if (name := f"student-{candidate.name}") not in differences:
            continue
        predictor = Predictor(task, export / candidate.file)
        judging[name] = predictor.logits(validation)
        values[name] = on_validation(task, validation, judging[name], taught)
        if candidate.graph == "plain" and candidate.precision != "fp16":
            answers[name] = predictor.logits(members)
    np.savez(out / "members.npz", **answers)
    judged_by = Validation(decisive(task, validation), values)
    if task.embeds:
        fp32 = judging["student-fp32"]
        shared = {name: float(task.agrees(vectors, fp32).mean()) for name, vectors in judging.items()}
        judged_by = msgspec.structs.replace(judged_by, shared=shared, least=task.int8.least)
    write_json(out / "validation.json", judged_by)
    say(
        f"verify: fp32 against PyTorch on {len(reference)} inputs: max |Δlogit| {differences['student-fp32']:.1e} "
        f"(allowed {FP32_TOLERANCE:.0e})"
    )


def compare(
    task: Task, export: Path, rows: Sequence[Row], reference: Array, allowed: float = FP32_TOLERANCE
) -> Iterator[tuple[Candidate, Array, float]]:
    """Every candidate with its logits [N, C] on the rows, and how far one of them is at most from PyTorch's.

    A fused graph that is further off than `allowed` is left out with all that is made of it, and said.

    Raises:
        VerificationError: the plain fp32 file is.
    """
    refused: set[str] = set()
    for candidate in read_candidates(export):
        if candidate.graph in refused:
            continue
        predictor = Predictor(task, export / candidate.file)
        found = predictor.logits(rows)
        difference = max(task.difference(found, reference), _small_shapes(predictor, rows, reference))
        if candidate.precision == "fp32" and not difference <= allowed:
            _refuse(candidate, difference, allowed)
            refused.add(candidate.graph)
            continue
        yield candidate, found, difference


def judge(task: Task, rows: Sequence[Row], logits: Array, teacher: Array, difference: float | None) -> Quality:
    """The metric of logits [N, C] on labelled rows, and how they stand to the teacher's."""
    return Quality(
        metric=Metric(*metric_interval(task, logits, rows), len(rows)),
        agreement=float(task.agrees(logits, teacher).mean()),
        mcnemar_p=mcnemar(task, logits, teacher, rows),
        max_abs_diff=difference,
        further=task.further(logits, rows) | task.compared(logits, teacher),
    )


def decisive(task: Task | type[Task], validation: Sequence[Row]) -> metrics.Metric:
    """The metric that decides on the validation split: agreement where no row has a label."""
    return task.metric if any(row["label"] is not None for row in validation) else AGREEMENT


def on_validation(task: Task, rows: Sequence[Row], logits: Array, teacher: Array) -> float:
    """The decisive metric of logits [N, C] on the validation split, by the rows that have labels."""
    labelled = [i for i, row in enumerate(rows) if row["label"] is not None]
    if not labelled:
        return float(task.agrees(logits, teacher).mean())
    return metric(task, logits[labelled], [rows[i] for i in labelled])


def read_quality(verify: Path) -> dict[str, Quality]:
    """`quality.json` of a finished verify stage."""
    return msgspec.json.decode((verify / "quality.json").read_bytes(), type=dict[str, Quality])


def read_validation(verify: Path) -> Validation:
    """`validation.json` of a finished verify stage."""
    return msgspec.json.decode((verify / "validation.json").read_bytes(), type=Validation)


def _small_shapes(predictor: Predictor, rows: Sequence[Row], reference: Array) -> float:
    """Batches of 1, and of 7 mixed lengths (much padding), against the same reference."""
    few = rows[:_SMALL_SHAPE_ROWS]
    single = predictor.logits(few, 1)
    sevens = [few[i : i + 7] for i in range(0, len(few), 7)]
    mixed = np.concatenate([predictor.logits(batch, 7) for batch in sevens])
    differences = [predictor.task.difference(found, reference[: len(few)]) for found in (single, mixed)]
    task = predictor.task
    if can_generate(task):
        pairs = zip(few[:8], reference, strict=False)
        differences += [_by_steps(predictor, task, row, answer) for row, answer in pairs]
    return max(differences)


def _by_steps(predictor: Predictor, task: Generates, row: Row, reference: Array) -> float:
    """max |Δ log p| of a text's tokens, read one by one through the cache."""
    first, *rest = task.tokenize([row])[0]["input_ids"].tolist() or [0]
    logits, past = predictor.read([first])
    differences = [0.0]
    for token, log_p in zip(rest, reference[:, LOG_P], strict=False):
        differences.append(abs(float(log_softmax(logits)[token] - log_p)))
        logits, past = predictor.read([token], past)
    return max(differences)


def _refuse(candidate: Candidate, difference: float, allowed: float) -> None:
    found = f"{candidate.file} differs from PyTorch by {difference:.1e} in a logit; {allowed:.0e} is allowed"
    if candidate.graph == "plain":
        raise VerificationError(found, "This is a fault of the export: please report it with the model's family")
    warn(f"verify: {found}; what is made of it is left out")
