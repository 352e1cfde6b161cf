"""Flags and output that commands share."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.errors import Interrupted, SpecError

Flag = typer.Option
Budget = partial(Flag, rich_help_panel="Budget")
BUDGET_NOT_MET = 3
# Parameters of the command line alone; all others are those of the Python function.
_OF_THE_TERMINAL = {"plan", "unsure_fails", "as_json", "debug"}
Debug = Annotated[bool, Flag("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, Flag("--json", help="Print the result as JSON on stdout; all else goes to stderr.")]
Out = Annotated[Path | None, Flag("--out", "-o", help="The run's folder.", show_default="runs/<data's name>")]
Max99 = Annotated[str | None, Budget("--max-p99", help="Budget: p99 latency, like 2ms.")]
MaxSize = Annotated[str | None, Budget("--max-size", help="Budget: file size, like 5MB.")]
MinRetention = Annotated[float | None, Budget("--min-retention", help="Budget: fraction of the teacher's metric.")]
TimeLimit = Annotated[str | None, Budget("--time-limit", help="A search trains no new student after this, like 30min.")]
MoveAside = Annotated[bool, Flag("--move-aside", help="Rename foreign files in the way to NAME.old-1, not refuse.")]
Text = Annotated[str | None, Flag("--text", help="Column of texts, images or sound.", show_default="guessed")]
TextPair = Annotated[str | None, Flag("--text-pair", help="Column of second texts.", show_default="guessed")]
Label = Annotated[str | None, Flag("--label", help="Column of labels.", show_default="guessed")]
Labels = Annotated[str | None, Flag("--labels", help="Labels of rows without any: refund,delay,praise.")]
SkipBadRows = Annotated[bool, Flag("--skip-bad-rows", help="Skip and count bad rows instead of stopping.")]
Sets = Annotated[list[str] | None, Flag("--set", metavar="KEY=VALUE", help="A spec key, like distill.batch_size=64.")]


def parse_sets(sets: list[str] | None) -> dict[str, Any]:
    """Parse `key=value` pairs; values are YAML: 3, true, [fp32]."""
    from kdexport.spec import read_yaml

    found = {}
    for pair in sets or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {pair!r} is not KEY=VALUE", "Write it like --set distill.batch_size=64")
        found[key] = read_yaml(value, f"--set {key}")
    return found


def finite(flag: typer.CallbackParam, value: float | None) -> float | None:
    """Refuse inf and nan, which Python parses as numbers."""
    if value is not None and not math.isfinite(value):
        raise SpecError(f"--{str(flag.name).replace('_', '-')} {value} is no finite number")
    return value


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of the Python function from a command's parameters."""
    return {name: value for name, value in given.items() if name not in _OF_THE_TERMINAL}


@contextmanager
def interruptible(then: str) -> Iterator[None]:
    """End the command on Ctrl-C with a line about its state."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(then) from None


def print_json(found: Any) -> None:
    """Print a record on stdout."""
    from kdexport.files import as_json

    typer.echo(as_json(found).decode(), nl=False)


def show_report(found: Any, run_folder: Path, as_json: bool) -> None:
    """Print a report on stdout: as a table, or as JSON."""
    if as_json:
        return print_json(found)
    from kdexport.report.terminal import show

    show(found, run_folder)
