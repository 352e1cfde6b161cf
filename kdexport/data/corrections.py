"""A person's answers to some texts, which replace a teacher's."""

from collections.abc import Collection
from pathlib import Path

from msgspec.structs import replace

from kdexport import spec
from kdexport.data.read import read_file
from kdexport.data.sources import to_rows
from kdexport.errors import DataError, counted
from kdexport.progress import warn
from kdexport.tasks import task_class


def read_corrections(path: Path, settings: spec.Spec, labels: Collection[str] | None = None) -> dict[str, str]:
    """Read texts and their labels; return content (`Task.content`) → label as the rows of the data have it.

    Raises:
        DataError: a row is bad, its label is none of `labels`, or its text has another label in an earlier row.
    """
    data, task = settings.data, task_class(settings.task, settings.data.problem)
    source = read_file(path)
    # Columns are named as in the data, or as we name them.
    named = {"text": data.text, "text_pair": data.text_pair, "label": data.label}
    known = {ours: name for ours, theirs in named.items() for name in (ours, theirs) if name in source.columns}
    found = to_rows(source, replace(data, text=None, text_pair=None, label=None), task, known=known)
    if found.bad:
        warn(f"teacher.corrections: {counted(found.bad, 'bad row')} left out")
    corrected: dict[str, str] = {}
    for row in found.rows:
        where, label = row["id"].replace(":", ", row "), row["label"]
        if labels is not None and (strange := sorted(task.labels_of(row) - {*labels})):
            fix = f"The labels of the data are: {', '.join([*labels][:8])}"
            raise DataError(f"teacher.corrections: {where}: label {strange[0]!r} is not known", fix)
        if corrected.setdefault(task.content(row), label) != label:
            raise DataError(f"teacher.corrections: {where}: an earlier row gives its text another label", "Remove one")
    return corrected
