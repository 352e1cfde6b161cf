"""Soft targets: the teachers' logits for every row of a run, looked up by example and never by step.

Each teacher computes each text once, in a shared cache (`teacher_outputs`, `store`). A run's `targets/` holds the
combined logits of its rows, and of the transfer rows, which the teachers alone label: unlabelled and augmented texts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.analysis.duplicates import keys_of
from kdexport.data import read_rows
from kdexport.data.rows import Row, Rows, write_rows
from kdexport.data.sources import SPLITS
from kdexport.distill.augment import changer, transfer_rows
from kdexport.distill.combine import columns_of, combine, joined, sure_of
from kdexport.distill.fine_tune import cause_of_chance
from kdexport.distill.samples import written_by
from kdexport.distill.store import cache_folder
from kdexport.distill.targets import writing
from kdexport.distill.teacher_outputs import Run, Teacher
from kdexport.distill.teachers import teachers_of
from kdexport.errors import ModelError, counted
from kdexport.files import write_json
from kdexport.output import PRIVATE
from kdexport.progress import say, warn
from kdexport.spec import derive
from kdexport.spec.teachers import OPEN
from kdexport.stages import read_record
from kdexport.tasks import load_task
from kdexport.tasks.base import Task, can_transcribe
from kdexport.tasks.judging import CHANCE_KAPPA, metric, near_chance
from kdexport.tasks.metrics import Array, cohen_kappa, confusion_matrix, softmax

TRANSFER = "transfer"
_SAMPLES = "samples"
_PREFLIGHT_ROWS = 256
_LEAST_LABELLED = 20  # of a teacher that labels texts, of which few rows may have a label: fewer tell nothing
_BLOCK, _BLOCK_BYTES = 8192, 1 << 25  # of rows, and of their logits
# Another order of labels is named where it reads better beyond luck, in standard errors, and by enough of the rows.
_SURE, _WORTH = 4.0, 0.05


def write_targets(
    data: Path,
    teacher: Path,
    out: Path,
    run_teacher: Run | None = None,
    *,
    how: spec.Teacher | None = None,
    augment: spec.Augment | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_word_error: float | None = None,
    corrections: Mapping[str, str] | None = None,
) -> None:
    """Write the teachers' combined logits for every row of every split, and check each teacher on labelled rows.

    `out` gets `train.npy`, `validation.npy`, `test.npy` (float32 [N, C], in the rows' order and that of the first
    teacher's labels), where there are transfer rows `transfer.jsonl` and `transfer.npy`; and `targets.json`. Those that
    a student learns from are in the task's format for disks; of others there is what metrics read.

    Args:
        run_teacher: rows → logits, in place of the teacher's own.
        samples: how many passages a language model generates, to train on as well.
        max_word_error: for speech; see `Transcripts.corrected`.
        corrections: content → label, which a person gave it.

    Raises:
        ModelError: a teacher is near chance on the labelled rows, or gives no finite logits.
    """
    how = how or spec.Teacher(model=str(teacher))
    task = load_task(teacher)
    splits = {split: read_rows(data, split) for split in SPLITS}
    unlabelled = read_rows(data, "unlabelled") if (data / "unlabelled.jsonl").is_file() else Rows()
    if samples:
        unlabelled += write_rows(out, _SAMPLES, written_by(teacher, splits["train"], samples, seed))
    labelled = {split: rows.where(lambda row: row["label"] is not None) for split, rows in splits.items()}
    outputs = read_record(teacher).outputs
    members = [Teacher(named, outputs, how, seed, run_teacher) for named in teachers_of(teacher)]
    names = [f"teacher {member.named.model}" if len(members) > 1 else "the teacher" for member in members]
    everything = reduce(add, splits.values())
    computed = sum(
        _read(member, everything, who, partial(_check, member, labelled, splits["test"], who))
        for member, who in zip(members, names, strict=True)
    )
    ours = Combined(task, members, how, corrections or {})
    if augment is None and not unlabelled and all(member.named.kind != "stored" for member in members):
        augment = _needed(ours, splits["train"])
    change = changer(teacher, augment, seed) if augment and augment.views else None
    if unlabelled or change:
        seen = [splits["validation"], splits["test"]]
        transfer = write_rows(out, TRANSFER, transfer_rows(splits["train"], unlabelled, change, type(task), seen))
        if transfer:
            splits[TRANSFER] = transfer
            computed += sum(_read(member, transfer, who) for member, who in zip(members, names, strict=True))
        else:
            (out / f"{TRANSFER}.jsonl").unlink()
    (out / f"{_SAMPLES}.jsonl").unlink(missing_ok=True)
    if corrections:
        _tell_corrected(corrections, {task.content(row) for rows in splits.values() for row in rows})
    accuracy, corrected = dict[str, float](), 0
    each: list[dict[str, float]] = [{} for _ in members]
    for split, rows in splits.items():
        limit = max_word_error if split == "train" and can_transcribe(task) else None
        values, of_split = _write(out / f"{split}.npy", ours, rows, split, limit)
        corrected += of_split
        if values:
            accuracy[split], *theirs = values
            for found, value in zip(each, theirs, strict=True):
                found[split] = value
    for shown in ("validation", "test"):
        if shown in accuracy:
            say(f"soft targets: teacher's {task.metric.name} on {shown} {task.metric.text(accuracy[shown])}")
            break
    record = {
        "texts": len(np.unique(np.concatenate([keys_of(rows, task.content) for rows in splits.values()]))),
        "metric": task.metric.name,
        "teacher": accuracy,
        "corrected": corrected,
    }
    if len(members) > 1:
        record["teachers"] = [
            {"model": member.named.model, "kind": member.named.kind, **found}
            for member, found in zip(members, each, strict=True)
        ]
    write_json(out / "targets.json", record)
    (out / PRIVATE).mkdir(exist_ok=True)  # apart from the stage's content: made again, it is the same
    write_json(out / PRIVATE / "computed.json", computed)


class Combined:
    """Several teachers' answers as one, and a person's in their place; labels are the first one's."""

    def __init__(
        self, task: Task, members: Sequence[Teacher], how: spec.Teacher, corrections: Mapping[str, str]
    ) -> None:
        self.task, self._members, self._how, self._corrections = task, members, how, corrections
        first = members[0].named.model
        self._places = [columns_of(task.labels, m.task.labels, first, m.named.model) for m in members]

    def answers(self, rows: Sequence[Row]) -> tuple[Array, list[Array]]:
        """Return the combined logits float32 [N, C] of computed rows, and each teacher's."""
        answers = [member.answers(rows) for member in self._members]
        each = [a[..., columns] if columns else a for a, columns in zip(answers, self._places, strict=True)]
        if self.task.embeds:
            return joined(each, self._how.weights), each
        return self._corrected(combine(each, self._how.weights, self._how.combine), rows), each

    def _corrected(self, logits: Array, rows: Sequence[Row]) -> Array:
        labels = [self._corrections.get(self.task.content(row)) for row in rows] if self._corrections else []
        if not (places := [i for i, label in enumerate(labels) if label is not None]):
            return logits
        found = logits.copy()
        found[places] = sure_of(self.task, [{"label": labels[i]} for i in places])
        return found


def _tell_corrected(corrections: Mapping[str, str], there: set[str]) -> None:
    say(f"soft targets: {counted(len(corrections.keys() & there), 'text')} as a person labelled them")
    if beyond := corrections.keys() - there:
        warn(f"teacher.corrections: {counted(len(beyond), 'text')} of {len(corrections):,} in no row of the data")


def _blocks(task: Task, rows: Rows, *, whole: bool = False) -> Iterator[list[Row]]:
    """Yield rows in blocks, which save memory, or as a whole."""
    size = len(rows) if whole else max(1, min(_BLOCK, _BLOCK_BYTES // (4 * math.prod(task.answer_shape))))
    return (list(rows[start : start + size]) for start in range(0, len(rows), size))


def _write(
    path: Path, teachers: Combined, rows: Rows, split: str, max_word_error: float | None
) -> tuple[list[float], int]:
    """Write the soft targets of a split, whole where a student learns from them, else what metrics read.

    Returns:
        The metric of the combined logits and of each teacher on labelled rows, empty where there are none; and the
        number of rows whose transcript replaces what the teacher heard.
    """
    task, sums, corrected = teachers.task, None, 0
    teaches = split in ("train", TRANSFER)
    with writing(path, len(rows)) as file:
        whole = not task.adds_up and not teaches
        for block in _blocks(task, rows, whole=whole):
            logits, each = teachers.answers(block)
            taught = logits
            if max_word_error is not None and can_transcribe(task):
                taught, count = task.corrected(logits, block, max_word_error)
                corrected += count
            file.add(task.pack(taught) if teaches else task.judged(taught))
            chosen = [i for i, row in enumerate(block) if row["label"] is not None]
            if chosen and split != TRANSFER and (whole or task.adds_up):
                with_label = [block[i] for i in chosen]
                stats = np.stack([task.stats(one[chosen], with_label).sum(axis=0) for one in (logits, *each)])
                sums = stats if sums is None else sums + stats
    if max_word_error is not None:
        over = f"word error rate over {max_word_error:.0%}"
        say(f"soft targets: {corrected:,} of {len(rows):,} are transcripts, where the teacher's text has a {over}")
    return [] if sums is None else [float(task.value(one)) for one in sums], corrected


def _check(teacher: Teacher, labelled: Mapping[str, Rows], test: Rows, who: str) -> None:
    """Refuse a teacher that is near chance on labelled rows."""
    asked = labelled["validation"] + labelled["train"] or test
    least = 1 if teacher.named.kind in OPEN else _LEAST_LABELLED
    if not teacher.task.labels_judge and sum(row["label"] is not None for row in asked) < least:
        return
    most = _PREFLIGHT_ROWS
    sample = list(asked[:most] if teacher.task.together else asked.take(sampled(len(asked), most)))
    teacher.read(sample, "soft targets (preflight)")
    _preflight(teacher, sample, who)


def _read(teacher: Teacher, rows: Rows, who: str, check: Callable[[], None] = lambda: None) -> int:
    """Compute what one teacher has not computed yet; return how many texts."""
    missing, texts = teacher.count(rows)
    check()
    if missing:
        say(f"soft targets: {who} reads {counted(missing, 'text')}")
        teacher.read(rows, "soft targets")
    if missing < texts and teacher.named.kind != "stored":
        say(f"soft targets: {texts - missing:,} of {texts:,} reused from {cache_folder()}")
    return missing


def _needed(teachers: Combined, rows: Rows) -> spec.Augment | None:
    """Return augmented texts where teachers are so sure of the training rows that they say hardly more than labels."""
    if teachers.task.objective != "classes" or not teachers.task.menu.augment:
        return None
    blocks = _blocks(teachers.task, rows)
    sure = sum(float(softmax(teachers.answers(block)[0]).max(axis=1).sum()) for block in blocks)
    copies = derive.views(sure / len(rows), len(rows))
    if not copies.value:
        return None
    say(f"soft targets: {copies.value:g} augmented copies of each text: {copies.reason}; --augment 0 makes none")
    return spec.Augment(views=int(copies.value))


def _preflight(teacher: Teacher, rows: Sequence[Row], who: str) -> None:
    """Refuse a teacher that is near chance, naming the likely cause."""
    task, logits = teacher.task, teacher.answers(rows)
    by_chance = near_chance(task, logits, rows)
    if task.config.function != "softmax":
        if by_chance:
            value = task.metric.text(metric(task, logits, rows))
            raise ModelError(
                f"{who} has a {task.metric.name} of {value} on {len(rows)} labelled rows", _remedy(teacher)
            )
        return
    items = task.items(rows, logits)
    counts = confusion_matrix(items.labels, items.logits.argmax(axis=1), len(task.labels))
    accuracy = np.trace(counts) / counts.sum()
    found = (
        f"{who} answers {accuracy:.1%} of {len(items.labels)} labelled {'words' if task.has_words else 'rows'} rightly"
    )
    found += ", which is near chance" if by_chance else ""
    # Where its labels are the data's, no other order can be meant.
    if cause_of_chance(teacher.named.folder) or teacher.named.kind == "zero-shot":
        if by_chance:
            raise ModelError(found, _remedy(teacher))
        return
    truth, answer = linear_sum_assignment(-counts)
    reordered = counts[truth, answer].sum() / counts.sum()
    stored = teacher.named.kind == "stored"
    # Labels that are numbers and no names are places in the teacher's order.
    names = range(len(task.labels)) if task.unknown(rows[0]) else task.labels
    order = ", ".join([str(names[i]) for i in np.argsort(answer)][:8])
    fix = "Name its columns in that order: labels" if stored else "Set id2label in its config.json to that order"
    better = cohen_kappa(counts[:, answer]) > 2 * CHANCE_KAPPA
    if by_chance and reordered > accuracy + 0.2 and better:
        raise ModelError(f"{found}. Its label order is not the data's: read as {order} it answers {reordered:.1%}", fix)
    moved = truth != answer
    gained, lost = counts[truth, answer][moved].sum(), np.diag(counts)[moved].sum()
    if gained - lost > max(_SURE * np.sqrt(gained + lost), _WORTH * counts.sum()):
        warn(f"{found}; read as {order} it answers {reordered:.1%}. If that is its label order: {fix}")
    if by_chance:
        raise ModelError(found, _remedy(teacher))


def _remedy(teacher: Teacher) -> str:
    """Return what to do about a teacher near chance."""
    fixes = {
        "torch": "Is it trained for these labels? To fine-tune it: --teacher-epochs 3",
        "onnx": "Is it trained for these labels?",
        "stored": "Are its rows in the order of the data's?",
        "zero-shot": "Describe the labels in data.labels, or word teacher.hypothesis for them",
    }
    return cause_of_chance(teacher.named.folder) or fixes[teacher.named.kind]
