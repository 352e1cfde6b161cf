"""Flags of the command line, which are keywords of the Python functions: their units, and the keys that they set."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdexport.errors import SpecError

_MOST, _SHOWN = 1_000_000, 40
SECONDS = {"s": 1.0, "ms": 1e-3, "min": 60.0, "m": 60.0, "h": 3600.0}
_UNITS = {
    "max_p99": {"ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3},
    "max_size": {"mb": 1.0, "kb": 1e-3, "gb": 1e3, "mib": 1.048576},
    "time_limit": SECONDS,
}
# flag of `run` → key of the spec
KEYS = {
    "teacher": "teacher.model",
    "teacher_epochs": "teacher.train.epochs",
    "data": "data.train",
    "task": "task",
    "test": "data.test",
    "text": "data.text",
    "text_pair": "data.text_pair",
    "label": "data.label",
    "unlabelled": "data.unlabelled",
    "labels": "data.labels",
    "max_calls": "teacher.ask.max_calls",
    "max_tokens": "teacher.ask.max_tokens",
    "max_length": "data.max_length",
    "skip_bad_rows": "data.skip_bad_rows",
    "student": "student.model",
    "loss": "distill.loss",
    "temperature": "distill.temperature",
    "alpha": "distill.alpha",
    "epochs": "distill.epochs",
    "augment": "distill.augment.views",
    "seeds": "distill.seeds",
    "no_baseline": "distill.baseline",
    "seed": "seed",
    "max_p99": "budget.p99_ms",
    "max_size": "budget.size_mb",
    "min_retention": "budget.retention",
    "time_limit": "budget.time_limit_s",
}


def overrides(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return key → value of the flags that are set: neither None, False nor empty."""
    found: dict[str, Any] = {}
    for name, key in KEYS.items():
        value = flags.get(name)
        if value is None or value is False or value == []:
            continue
        if name in _UNITS:
            value = quantity(value, f"--{name.replace('_', '-')}", _UNITS[name])
        elif name == "labels":
            value = [label.strip() for label in value.split(",")] if isinstance(value, str) else value
        elif isinstance(value, list | tuple):
            value = [_plain(one) for one in value] if len(value) > 1 else _plain(value[0])
        found[key] = value if name == "labels" else name != "no_baseline" and _plain(value)
    return found


def rows_in(place: object, text: str | None, text_pair: str | None, label: str | None, skip_bad_rows: bool) -> Any:
    """Return the section `data` of a spec for a file (or folder, or hub id) and the flags that say how it is read."""
    from kdexport.spec.sections import Data

    if place is None and (text or text_pair or label or skip_bad_rows):
        raise SpecError("--text, --text-pair, --label and --skip-bad-rows are of a file", "Name the file too")
    return place and Data(train=str(place), text=text, text_pair=text_pair, label=label, skip_bad_rows=skip_bad_rows)


def quantity(text: str | float, flag: str, units: Mapping[str, float]) -> float:
    """`2ms` → 2.0; a bare number is in the first unit."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*([a-zµ%/]*)\s*", str(text).lower())
    unit = units.get(found[3] or next(iter(units))) if found else None
    value = float(found[1] + (found[2] or "")) * unit if found and unit is not None else math.inf
    if not math.isfinite(value):
        known = ", ".join(unit for unit in units if unit)
        raise SpecError(f"{flag} {str(text)[:_SHOWN]!r} can't be read", f"Write a number and one of: {known}")
    return value


def listed(values: str | int | Sequence[str | int]) -> list[str]:
    """`1,4`, 1 or [1, 4] → ["1", "4"]."""
    return str(values).split(",") if isinstance(values, str | int) else [str(value) for value in values]


def numbers(values: str | int | Sequence[str | int], flag: str, least: int = 1) -> list[int]:
    """`1,4` → [1, 4]; none below `least`, nor above a million."""
    try:
        found = [int(part) for part in listed(values)]
    except ValueError:
        found = []
    if not found or not least <= min(found) <= max(found) <= _MOST:
        fix = f"Write whole numbers from {least} on, like 1,4; at most {_MOST}"
        raise SpecError(f"{flag} {','.join(listed(values))[:_SHOWN]!r} can't be read", fix)
    return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
