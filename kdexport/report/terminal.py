"""The report in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kdexport.report.table import HEADERS, percent, points, table
from kdexport.results import Report


def show(report: Report, run: Path) -> None:
    """Print the table of variants, what distillation gave, and where the files are, on stdout."""
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 120))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(HEADERS):
        grid.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for row, variant in zip(table(report), report.variants, strict=True):
        grid.add_row(*row, style="bold" if variant.name == report.recommended else "")
    console.print(grid)
    for line in summary(report):
        console.print(line, markup=False)
    best = report.variant(report.recommended)
    console.print(f"ship {run}/artifact ({best.file})   report {run}/report.html", markup=False)


def summary(report: Report) -> list[str]:
    """The few sentences under the table."""
    found, best = report.distillation, report.variant(report.recommended)
    lines = [
        f"★ {best.name}: {report.reason}; keeps {percent(found.retention)} of the teacher's {report.metric} "
        f"({best.metric.n} test rows).",
    ]
    if found.baseline and found.gain_points is not None:
        lines.append(
            f"The same student on labels alone: {percent(found.baseline.value)}; distillation: "
            f"{points(found.gain_points)} (McNemar p = {found.gain_mcnemar_p:.2f})."
        )
    if report.budget.met is not None:
        lines += [
            f"budget {check.name}: {'kept' if check.met else 'NOT kept'}, "
            f"{'not measurable' if check.found is None else f'{check.found:.3g}'} (limit {check.limit:g})"
            for check in report.budget.checks
        ]
    return lines
