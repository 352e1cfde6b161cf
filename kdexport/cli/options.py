"""What commands share: flags, quantities with units, and how a report is shown."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.errors import SpecError

Flag = typer.Option
_MOST, _SHOWN = 1_000_000, 40
Debug = Annotated[bool, Flag("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, Flag("--json", help="Print the result as JSON on stdout; all else goes to stderr.")]
Out = Annotated[Path | None, Flag("--out", "-o", help="The run's folder.", show_default="runs/<data's name>")]
Max99 = Annotated[str | None, Flag("--max-p99", help="Budget: p99 latency, like 2ms.", rich_help_panel="Budget")]
MaxSize = Annotated[str | None, Flag("--max-size", help="Budget: file size, like 5MB.", rich_help_panel="Budget")]
MinRetention = Annotated[
    float | None,
    Flag("--min-retention", help="Budget: share of the teacher's metric.", rich_help_panel="Budget"),
]
TimeLimit = Annotated[
    str | None,
    Flag("--time-limit", help="A search trains no new student after this, like 30min.", rich_help_panel="Budget"),
]
MoveAside = Annotated[
    bool,
    Flag("--move-aside", help="Rename what kdexport did not write and is in the way to NAME.old-1, not refuse."),
]
Text = Annotated[str | None, Flag("--text", help="Column of texts, images or sound.", show_default="guessed")]
TextPair = Annotated[str | None, Flag("--text-pair", help="Column of second texts.", show_default="guessed")]
Label = Annotated[str | None, Flag("--label", help="Column of labels.", show_default="guessed")]
SkipBadRows = Annotated[bool, Flag("--skip-bad-rows", help="Leave bad rows out and count them, not stop.")]
Sets = Annotated[
    list[str] | None,
    Flag("--set", metavar="KEY=VALUE", help="Any other key of the spec, like --set distill.batch_size=64."),
]


def parse_sets(sets: list[str] | None) -> dict[str, Any]:
    """`key=value` pairs; values are read as YAML, so 3, true and [fp32] mean what they look like."""
    from kdexport.spec import read_yaml

    found = {}
    for pair in sets or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {pair!r} is not KEY=VALUE", "Write it like --set distill.batch_size=64")
        found[key] = read_yaml(value, f"--set {key}")
    return found


def rows_in(place: object, text: str | None, text_pair: str | None, label: str | None, skip_bad_rows: bool) -> Any:
    """The section `data` of a spec for a file (or folder, or hub id) and the flags that say how it is read."""
    from kdexport import spec

    if place is None and (text or text_pair or label or skip_bad_rows):
        raise SpecError("--text, --text-pair, --label and --skip-bad-rows are of a file", "Name the file too")
    return place and spec.Data(
        train=str(place), text=text, text_pair=text_pair, label=label, skip_bad_rows=skip_bad_rows
    )


def quantity(text: str | None, flag: str, units: dict[str, float]) -> float | None:
    """`2ms` → 2.0; a bare number is in the first unit."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*([a-zµ%/]*)\s*", text.lower())
    unit = units.get(found[3] or next(iter(units))) if found else None
    value = float(found[1] + (found[2] or "")) * unit if found and unit is not None else math.inf
    if not math.isfinite(value):
        known = ", ".join(unit for unit in units if unit)
        raise SpecError(f"{flag} {text[:_SHOWN]!r} can't be read", f"Write a number and one of: {known}")
    return value


def numbers(text: str, flag: str, least: int = 1) -> list[int]:
    """`1,4` → [1, 4]; none below `least`, nor above a million."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not least <= min(found) <= max(found) <= _MOST:
        raise SpecError(
            f"{flag} {text[:_SHOWN]!r} can't be read",
            f"Write whole numbers from {least} on, like 1,4; at most {_MOST}",
        )
    return found


def finite(flag: typer.CallbackParam, value: float | None) -> float | None:
    """Refuse inf and nan, which Python reads as numbers."""
    if value is not None and not math.isfinite(value):
        raise SpecError(f"--{str(flag.name).replace('_', '-')} {value} is no finite number")
    return value


def show_report(found: Any, run_folder: Path, as_json: bool) -> None:
    """Print a report on stdout: as a table, or as JSON."""
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    from kdexport.report.terminal import show

    show(found, run_folder)
