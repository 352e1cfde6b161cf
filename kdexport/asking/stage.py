"""The asked stage: the texts that a teacher was asked about, with its answers, as a data stage of their own.

It writes what a data stage writes, but only the rows that have an answer; `logits/`, the answers by content;
`asked.json`, how they came about; and `answers.jsonl`, to read, to correct, and to use as a teacher again.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kdexport import spec
from kdexport.asking.answered import Answered, distinct, judge
from kdexport.asking.given import Given, labels_of
from kdexport.data import read_rows, read_summary
from kdexport.data.corrections import read_corrections
from kdexport.data.rows import Row, write_rows
from kdexport.data.sources import SPLITS
from kdexport.distill.store import Store, content_keys
from kdexport.distill.teachers import corrections_of
from kdexport.errors import ModelError, counted
from kdexport.files import write_bytes, write_json
from kdexport.progress import say
from kdexport.spec.teachers import kind_of, named
from kdexport.tasks.base import Task

ANSWERS, RECORD, LOGITS = "answers.jsonl", "asked.json", "logits"
_FEWEST = 20  # training texts
_SHOWN = 0.0005  # probability of a label that stands in the file of answers


def settings_of(settings: spec.Spec) -> list[Any]:
    """Return the part of the spec that the stage depends on."""
    teacher = settings.teacher
    ask = teacher.ask and {
        name: value
        for name, value in msgspec.to_builtins(teacher.ask).items()
        if name not in ("concurrency", "timeout_s", "key", "price")
    }
    data, base = settings.data, settings.student.base
    return [teacher.model, ask, data.labels, data.problem, data.max_length, settings.task, base, settings.seed]


def files(settings: spec.Spec) -> list[Path]:
    """Return the user's files that the stage reads; raise ModelError if one is missing."""
    given = [Path(model) for model in named(settings) if kind_of(model) == "answers"]
    for file in given:
        if not file.is_file():
            raise ModelError(f"teacher {file} does not exist", "Check the path")
    return [*given, *corrections_of(settings)]


def with_labels(settings: spec.Spec) -> spec.Spec:
    """Return the spec with the labels of a file of answers, where it names none."""
    teacher = named(settings)[0]
    if settings.data.labels is not None or kind_of(teacher) != "answers":
        return settings
    files(settings)
    data = msgspec.structs.replace(settings.data, labels=tuple(labels_of(Path(teacher))))
    return msgspec.structs.replace(settings, data=data)


def ask(settings: spec.Spec, data: Path, out: Path) -> None:
    """Write the answered rows of a data stage as one, with the answers and how they came about.

    Raises:
        EndpointError: the endpoint can't be reached or used, or its answers can't be read.
        ModelError: the teacher is near chance on labelled rows, or too few texts have an answer.
    """
    model, task = named(settings)[0], judge(settings, data)
    splits = {split: read_rows(data, split) for split in SPLITS}
    beyond = [read_rows(data, "unlabelled")] if (data / "unlabelled.jsonl").is_file() else []
    pool = distinct(task, sum(beyond, splits["train"]))
    corrected: dict[str, str] = {}
    for file in corrections_of(settings):
        corrected |= read_corrections(file, settings, task.labels)
    if kind_of(model) == "answers":
        given = Given(Path(model), task.labels, type(task))
        found = Answered(task, corrected, given.read)
        taken: dict[str, Sequence[Row]] = {split: found.of(rows) for split, rows in (splits | {"train": pool}).items()}
        record = None
    else:
        from kdexport.asking.rounds import ask_in_rounds

        taken, found, record = ask_in_rounds(settings, task, splits, pool, corrected)
    _check_enough(taken, found, task)
    summary = read_summary(data)
    for split in SPLITS:
        write_rows(out, split, _judging(taken[split]) if split != "train" else taken[split])
    counts, guessed = {split: len(taken[split]) for split in SPLITS}, taken.get("unlabelled", ())
    if guessed:
        write_rows(out, "unlabelled", guessed)
    write_json(out / "data.json", msgspec.structs.replace(summary, rows=counts, unlabelled=len(guessed)))
    if (data / "near_duplicates.jsonl").is_file():
        write_bytes(out / "near_duplicates.jsonl", (data / "near_duplicates.jsonl").read_bytes())
    _write_answers(out, task, taken, found)
    if record:
        write_json(out / RECORD, record)
    say(f"asked: {', '.join(f'{n:,} {split}' for split, n in counts.items())} with an answer")


def _judging(rows: Sequence[Row]) -> list[Row]:
    """Return rows of a split that judges: labelled throughout, or else without labels, as the teacher judges."""
    if all(row["label"] is not None for row in rows):
        return [*rows]
    return [row | {"label": None} for row in rows]


def _check_enough(taken: Mapping[str, Sequence[Row]], found: Answered, task: Task) -> None:
    """Refuse too few answers to learn from, or to judge by, and say why the others have none."""
    why = ", ".join(f"{count:,} {cause}" for cause, count in Counter(found.unanswered.values()).most_common(3))
    more = f" ({why})" if why else ""
    for split, least in (("train", _FEWEST), ("validation", 1), ("test", 1)):
        if len(taken[split]) < least:
            what = (
                f"{counted(len(taken[split]), 'text')} of {split} have an answer, and at least {least} need one{more}"
            )
            raise ModelError(what, "Give more texts, or raise the limits of calls and tokens, if they bind")
    best = found.array(taken["train"])
    there = {*best.argmax(axis=1).tolist()} if task.one_label else {0, 1}
    if len(there) < 2:
        label = task.labels[there.pop()]
        raise ModelError(f"the teacher gives all {len(best):,} texts the label {label!r}", "Reword the labels")


def _write_answers(out: Path, task: Task, taken: Mapping[str, Sequence[Row]], found: Answered) -> None:
    """Write the answers for the run, by content, and for people, as JSON lines."""
    every = {task.content(row): row for rows in taken.values() for row in rows}
    shutil.rmtree(out / LOGITS, ignore_errors=True)
    Store(out / LOGITS).add(content_keys(every), found.array([*every.values()]))
    rows = [row for content, row in every.items() if content not in found.guessed]
    logits = found.array(rows)
    lines = []
    for row, scores in zip(rows, task.scores(logits), strict=True):
        texts = {side: row[side] for side in ("text", "text_pair") if row.get(side)}
        best = sorted(zip(task.labels, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        lines.append(texts | {"labels": {label: round(score, 4) for label, score in best if score >= _SHOWN}})
    write_bytes(out / ANSWERS, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
