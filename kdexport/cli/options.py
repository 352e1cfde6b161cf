"""What commands share: flags, and how results are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.errors import Interrupted, SpecError

Flag = typer.Option
BUDGET_NOT_MET = 3
# Parameters that are of the command line alone; all others are those of the Python function.
_OF_THE_TERMINAL = {"plan", "unsure_fails", "as_json", "debug"}
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


def finite(flag: typer.CallbackParam, value: float | None) -> float | None:
    """Refuse inf and nan, which Python reads as numbers."""
    if value is not None and not math.isfinite(value):
        raise SpecError(f"--{str(flag.name).replace('_', '-')} {value} is no finite number")
    return value


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the Python function from all parameters of its command."""
    return {name: value for name, value in given.items() if name not in _OF_THE_TERMINAL}


@contextmanager
def interruptible(then: str) -> Iterator[None]:
    """Let Ctrl-C end the command with a line that says what is left."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(then) from None


def print_json(found: Any) -> None:
    """Print a record on stdout."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def show_report(found: Any, run_folder: Path, as_json: bool) -> None:
    """Print a report on stdout: as a table, or as JSON."""
    if as_json:
        return print_json(found)
    from kdexport.report.terminal import show

    show(found, run_folder)
