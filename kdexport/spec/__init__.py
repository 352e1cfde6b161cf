"""The spec: every setting, declared once with its type, default, unit and help.

A spec comes from a YAML file and from flags, which win. Unknown keys, values out of range, and keys without an effect
are errors that name the key. `None` is derived later, with the reason (`kdexport run --plan`).
"""

from kdexport.spec.ask import Ask
from kdexport.spec.checks import weights_of
from kdexport.spec.read import commented, dump, load, of_results, parse, parse_bench, read_yaml, settings, values
from kdexport.spec.sections import (
    Augment,
    Bench,
    Budget,
    Data,
    Distill,
    Export,
    Schedule,
    Spec,
    Student,
    Teacher,
    TeacherTraining,
    Weight,
)

__all__ = [
    "Ask", "Augment", "Bench", "Budget", "Data", "Distill", "Export", "Schedule", "Spec", "Student", "Teacher",
    "TeacherTraining", "Weight", "commented", "dump", "load", "of_results", "parse", "parse_bench", "read_yaml",
    "settings", "values", "weights_of",
]  # fmt: skip
