"""Teacher and student compared by class, by confidence, and where they differ."""

from collections.abc import Sequence

import msgspec
import numpy as np

from kdexport.analysis import shortened
from kdexport.results import Answer, Bin, Calibration, ClassScore, Evidence, Example
from kdexport.tasks.base import Task
from kdexport.tasks.config import Items, Row
from kdexport.tasks.metrics import Array, reliability, softmax

_EXAMPLES, _CHARACTERS = 12, 240


def look_closely(task: Task, rows: Sequence[Row], teacher: Array, student: Array) -> Evidence:
    """Compare two models' logits [N, *answer_shape] on the test split; without labels only where they differ."""
    items, of_teacher = task.items(rows, student), task.items(rows, teacher)
    if not len(items.labels) and task.config.function == "softmax" and teacher.ndim == 2:
        by_teacher = Items(np.arange(len(rows)), teacher.argmax(axis=1), student)
        scores = (softmax(logits.astype(np.float64)) for logits in (teacher, student))
        found = [msgspec.structs.replace(one, label="–") for one in _examples(task, rows, by_teacher, *scores)]
        return Evidence(classes=[], calibration={}, examples=found)
    classes = _classes(task.labels, items.labels, task.chosen(of_teacher), task.chosen(items))
    if task.config.function != "softmax":
        return Evidence(classes=classes, calibration={}, examples=[])
    sides = {"teacher": of_teacher, "student": items}
    sure = {name: softmax(side.logits.astype(np.float64)) for name, side in sides.items()}
    calibration = {}
    for name, probabilities in sure.items():
        error, bins = reliability(probabilities, items.labels)
        calibration[name] = Calibration(error, [Bin(*one) for one in bins])
    examples = _examples(task, rows, items, sure["teacher"], sure["student"])
    return Evidence(classes=classes, calibration=calibration, examples=examples)


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


def _examples(task: Task, rows: Sequence[Row], items: Items, teacher: Array, student: Array) -> list[Example]:
    """Return rows with different answers, the most confident disagreements first."""
    names = task.labels
    theirs, ours = teacher.argmax(axis=1), student.argmax(axis=1)
    differ = np.flatnonzero(theirs != ours)
    weight = teacher.max(axis=1) * student.max(axis=1)
    chosen = differ[np.argsort(-weight[differ], kind="stable")][:_EXAMPLES]
    return [
        Example(
            id=(row := rows[items.of[i]])["id"],
            text=shortened(f"{items.words[i]} ‖ {task.title(row)}" if items.words else task.title(row), _CHARACTERS),
            label=names[items.labels[i]],
            teacher=Answer(names[theirs[i]], float(teacher[i, theirs[i]])),
            student=Answer(names[ours[i]], float(student[i, ours[i]])),
        )
        for i in chosen.tolist()
    ]
