"""The report in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kdexport.report.table import BITS, headers, percent, points, table
from kdexport.results import Report


def show(report: Report, folder: Path) -> None:
    """Print the table of variants, what distillation gave, and where the files are, on stdout."""
    bold = next((i for i, v in enumerate(report.variants) if v.name == report.recommended), None)
    show_table(headers(report), table(report), bold)
    for line in summary(report):
        print_line(line)
    if report.recommended:
        print_line(f"ship {folder}/artifact ({report.variant(report.recommended).file})")
    print_line(f"report {folder}/report.html")


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None = None) -> None:
    """Print cells as a table that is never cut: the first column to the left, the others to the right."""
    console = _console()
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        grid.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for i, row in enumerate(rows):
        grid.add_row(*row, style="bold" if i == bold else "")
    console.print(grid)


def print_line(line: str) -> None:
    """Print one line on stdout, as it is."""
    _console().print(line, markup=False)


def summary(report: Report) -> list[str]:
    """The few sentences under the table."""
    found, lines = report.distillation, []
    if report.search:
        lines.append(f"search: {report.search.reason}.")
    if found and report.recommended:
        best = report.variant(report.recommended)
        lines.append(
            f"★ {best.name}: {report.reason}; keeps {percent(found.retention)} of the teacher's {report.metric} "
            f"({found.teacher.n} test rows)."
        )
        if BITS in best.further and "teacher" in found.further:
            lines.append(_bits(best.further[BITS], {name: each[BITS] for name, each in found.further.items()}))
        if found.baseline and found.gain_points is not None:
            p = "" if found.gain_mcnemar_p is None else f" (McNemar p = {found.gain_mcnemar_p:.2f})"
            way = "" if found.ratio is None else f", {percent(found.ratio, 0)} of the way to the teacher"
            lines.append(
                f"The same student on labels alone: {percent(found.baseline.value)}; distillation: "
                f"{points(found.gain_points)}{p}{way}."
            )
        for name, spread in (("student", found.student_seeds), ("labels alone", found.baseline_seeds)):
            if spread:
                told = f"{percent(spread.mean, 2)} ± {100 * spread.deviation:.2f} points"
                lines.append(f"{len(spread.values)} seeds, in PyTorch: {name} {told}.")
    elif report.reason:
        lines.append(report.reason)
    lines += [
        f"budget {check.name}: {'kept' if check.met else 'NOT kept'}{'' if check.sure else ', not for sure'}, "
        f"{'not measurable' if check.found is None else f'{check.found:.3g}'} (limit {check.limit:g})"
        for check in report.budget.checks
    ]
    return lines + [f"doubt: {line}" for line in report.bench.warnings]


def _bits(best: float, others: dict[str, float]) -> str:
    told = f"{best:.3f} {BITS}, {100 * (best / others['teacher'] - 1):+.1f} % on the teacher's {others['teacher']:.3f}"
    baseline = others.get("baseline")
    return f"{told}; on labels alone {baseline:.3f}." if baseline else f"{told}."


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=max(Console().width, 180))
