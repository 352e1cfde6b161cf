"""The spec: every setting, declared once with its type, default, unit and help.

A spec comes from a YAML file and from flags; flags win. Unknown keys, values out of range, and keys that
would have no effect are errors that name the key. What is left at `None` is derived later, with the reason
(`kdexport run --plan`).
"""

from kdexport.spec.checks import losses_of, several_students, weights_of
from kdexport.spec.read import commented, dump, load, parse, parse_bench, read_yaml, settings, walk
from kdexport.spec.sections import (
    Augment,
    Bench,
    Budget,
    Data,
    Distill,
    Export,
    Precision,
    Schedule,
    Spec,
    Student,
    Teacher,
    TeacherTraining,
    Weight,
)

__all__ = [
    "Augment",
    "Bench",
    "Budget",
    "Data",
    "Distill",
    "Export",
    "Precision",
    "Schedule",
    "Spec",
    "Student",
    "Teacher",
    "TeacherTraining",
    "Weight",
    "commented",
    "dump",
    "load",
    "losses_of",
    "parse",
    "parse_bench",
    "read_yaml",
    "settings",
    "several_students",
    "walk",
    "weights_of",
]
