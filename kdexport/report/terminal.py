"""Print a report in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kdexport.errors import counted
from kdexport.report.asked import saves
from kdexport.report.table import (
    checked,
    deviation,
    headers,
    helped,
    keeps,
    metric_of,
    percent,
    score,
    speedup,
    table,
    times,
)
from kdexport.results import Report, machine_name, made_elsewhere


def show(report: Report, folder: Path) -> None:
    """Print the table of variants, the summary, and the paths of the files."""
    bold = next((i for i, v in enumerate(report.variants) if v.name == report.recommended), None)
    show_table(headers(report), table(report), bold)
    for line in summary(report):
        print_line(line)
    if report.recommended:
        print_line(f"ship {folder}/artifact ({report.variant(report.recommended).file})")
    print_line(f"report {folder}/report.html")
    if said := conclusion(report):
        print_line(said)


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None = None) -> None:
    """Print a table without truncation: the first column aligned left, the others right."""
    console = _console()
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        grid.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for i, row in enumerate(rows):
        grid.add_row(*row, style="bold" if i == bold else "")
    console.print(grid)


def print_line(line: str) -> None:
    """Print one line without markup."""
    _console().print(line, markup=False)


def summary(report: Report) -> list[str]:
    """Return the lines under the table."""
    found, lines, metric = report.distillation, [], metric_of(report)
    if report.search:
        lines.append(f"search: {report.search.reason}.")
    if report.asked:
        lines.append(
            f"asked: {report.asked.model} labelled {report.asked.texts.get('train', 0):,} of "
            f"{counted(report.asked.pool, 'text')} of train. {saves(report)}".rstrip()
        )
    if found and report.recommended:
        best = report.variant(report.recommended)
        lines.append(f"★ {best.name}: {report.reason}; {keeps(report, found)} ({counted(found.teacher.n, 'row')}).")
        if found.baseline and found.gain_points is not None:
            fraction = metric.kind == "fraction" and found.gain_mcnemar_p is not None
            p = f" (McNemar p = {found.gain_mcnemar_p:.2f})".replace("= 0.00", "< 0.01") if fraction else ""
            way = f", {percent(found.ratio, 0)} of the way to the teacher" if found.ratio is not None else ""
            way = way if found.gain_points > 0 else ""
            lines.append(
                f"The same student on labels alone: {score(metric, found.baseline.value)}; distillation "
                f"{helped(metric, found.gain_points, found.gain_ci95)}{p}{way}."
            )
        for name, spread in (("student", found.student_seeds), ("labels alone", found.baseline_seeds)):
            if spread:
                mean = f"{score(metric, spread.mean, 2)} ± {deviation(metric, spread)}"
                lines.append(f"{len(spread.values)} seeds, in PyTorch: {name} {mean}.")
    elif report.reason:
        lines.append(report.reason)
    lines += [
        f"budget {check.name}: {'kept' if check.met else 'NOT kept'}{'' if check.sure else ', not for sure'}, "
        f"{checked(check)} (limit {check.limit:g})"
        for check in report.budget.checks
    ]
    lines.append(f"measured on {machine_name(report.environment)}, {counted(report.bench.threads, 'thread')}")
    lines += [f"{', '.join(stages)}: made on {name}" for name, stages in made_elsewhere(report).items()]
    if report.bench.warnings:
        first, *others = report.bench.warnings
        lines.append(f"warning: {first}{f' ({len(others)} more in report.html)' if others else ''}")
    return lines


def conclusion(report: Report) -> str | None:
    """Say in one sentence what distillation gained and what it saves; None where no baseline was trained."""
    found = report.distillation
    if not found or not report.recommended or found.gain_points is None:
        return None
    best, teacher, metric = report.variant(report.recommended), report.variants[0], metric_of(report)
    labelled, more = report.data.get("labelled"), report.data.get("unlabelled", 0)
    if not labelled:  # reports of before, and language models
        return None
    rows = counted(labelled, "label") + (f" and {counted(more, 'text')} without" if more else "")
    saved = [f"{speedup(best)} as fast" if best.speedup_p50 else ""]
    if best.size_bytes and teacher.size_bytes:
        saved.append(f"{times(teacher.size_bytes / best.size_bytes)} smaller")
    size = " and ".join(filter(None, saved))
    gain = helped(metric, found.gain_points, found.gain_ci95)
    return f"With {rows}, the student {keeps(report, found)}, {size}; distillation {gain} compared with labels alone."


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=max(Console().width, 180))
