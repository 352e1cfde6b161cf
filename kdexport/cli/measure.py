"""Commands that measure and tell: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdexport.cli.options import Debug, Json, show_report


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw report.md and report.html again from report.json, and show the table.

    [bold]Example[/bold]

      kdexport report runs/demo
    """
    from kdexport.report import redraw

    show_report(redraw(run_folder), run_folder, as_json)
