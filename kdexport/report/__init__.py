"""Results → terminal, Markdown, HTML and the model card. Reads results only; nothing is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from kdexport.report.table import HEADERS, ms, percent, points, table, times
from kdexport.results import Report, read_report, write_report
from kdexport.rundir import write_text


def write_reports(report: Report, run: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into a run folder."""
    write_report(report, run / "report.json")
    draw(report, run)


def redraw(run: Path) -> Report:
    """Draw Markdown and HTML again from `report.json`.

    Raises:
        RunError: the run has no readable report.
    """
    report = read_report(run / "report.json")
    draw(report, run)
    return report


def draw(report: Report, run: Path) -> None:
    """Write `report.md` and `report.html`."""
    write_text(run / "report.md", render("report.md.j2", report))
    write_text(run / "report.html", render("report.html.j2", report))


def write_card(report: Report, file: Path) -> None:
    """Write the model card, with the metrics as a model-index."""
    write_text(file, render("card.md.j2", report))


def render(template: str, report: Report) -> str:
    """A template filled from a report; HTML is escaped."""
    environment = Environment(
        loader=PackageLoader("kdexport.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "ms": ms, "times": times, "points": points}
    best, teacher = report.variant(report.recommended), report.variants[0]
    values: dict[str, Any] = {
        "r": report,
        "best": best,
        "teacher": teacher,
        "headers": HEADERS,
        "rows": table(report),
    }
    return environment.get_template(template).render(values)
