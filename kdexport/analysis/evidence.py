"""Teacher and student compared by class, by confidence, and where they differ."""

from typing import Any

import numpy as np

from kdexport.results import Answer, Bin, Calibration, ClassScore, Evidence, Example
from kdexport.tasks.base import Task
from kdexport.tasks.config import Items
from kdexport.tasks.metrics import Array, reliability, softmax

_EXAMPLES, _CHARACTERS = 12, 240


def look_closely(task: Task, rows: list[dict[str, Any]], teacher: Array, student: Array) -> Evidence:
    """Compare two models' logits [N, *answer_shape] on the test split."""
    items, of_teacher = task.items(rows, student), task.items(rows, teacher)
    classes = _classes(task.labels, items.labels, task.chosen(of_teacher), task.chosen(items))
    if task.config.function != "softmax":
        return Evidence(classes=classes, calibration={}, examples=[])
    theirs = of_teacher.logits
    sure = {"teacher": softmax(theirs.astype(np.float64)), "student": softmax(items.logits.astype(np.float64))}
    return Evidence(
        classes=classes,
        calibration={name: _calibration(probabilities, items.labels) for name, probabilities in sure.items()},
        examples=_examples(task, rows, items, sure["teacher"], sure["student"]),
    )


def _classes(names: list[str], labels: Array, teacher: Array, student: Array) -> list[ClassScore]:
    """Return recall by class, the largest loss first."""
    found = []
    for i, name in enumerate(names):
        of_class = labels == i
        if n := int(of_class.sum()):
            recalls = [float((side[of_class] == i).mean()) for side in (teacher, student)]
            agreement = float((teacher[of_class] == student[of_class]).mean())
            found.append(ClassScore(name, n, recalls[0], recalls[1], agreement))
    return sorted(found, key=lambda c: (c.student_recall - c.teacher_recall, c.student_recall, c.label))


def _calibration(probabilities: Array, labels: Array) -> Calibration:
    error, bins = reliability(probabilities, labels)
    return Calibration(error, [Bin(*one) for one in bins])


def _examples(task: Task, rows: list[dict[str, Any]], items: Items, teacher: Array, student: Array) -> list[Example]:
    """Return rows with different answers, the most confident disagreements first."""
    names = task.labels
    theirs, ours = teacher.argmax(axis=1), student.argmax(axis=1)
    differ = np.flatnonzero(theirs != ours)
    weight = teacher.max(axis=1) * student.max(axis=1)
    chosen = differ[np.argsort(-weight[differ], kind="stable")][:_EXAMPLES]
    return [
        Example(
            id=(row := rows[items.of[i]])["id"],
            text=_short(" ‖ ".join(filter(None, (str(items.words[i]) if items.words else "", task.title(row))))),
            label=names[items.labels[i]],
            teacher=Answer(names[theirs[i]], float(teacher[i, theirs[i]])),
            student=Answer(names[ours[i]], float(student[i, ours[i]])),
        )
        for i in chosen.tolist()
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS].rstrip()} …"
