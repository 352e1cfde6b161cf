"""Render results in the terminal, as Markdown, HTML and a model card; nothing is measured here."""

from functools import partial
from pathlib import Path

import msgspec

from kdexport import __version__
from kdexport.files import as_json, write_text
from kdexport.output import Output
from kdexport.report import page
from kdexport.report.sections import SECTIONS
from kdexport.report.table import (
    between,
    headers,
    megabytes,
    metric_of,
    p50,
    p99,
    percent,
    read_by,
    real_time,
    score,
    table,
    trimmed,
)
from kdexport.results import Exported, Report, read_report
from kdexport.tasks import task_class
from kdexport.tasks.judging import AGREEMENT


def write_reports(report: Report, out: Output) -> None:
    """Write `report.json`, `report.md` and `report.html` into a folder."""
    out.write("report.json", as_json(report))
    draw(report, out)


def redraw(folder: Path, price_per_hour: float | None = None, *, move_aside: bool = False) -> Report:
    """Render `report.json` again, after setting another price in it, if one is given.

    Raises:
        RunError: the folder has no readable report, or kdexport did not write the files to replace.
    """
    report = read_report(folder / "report.json")
    with Output(folder, "report", move_aside=move_aside) as out:
        if price_per_hour is not None:
            priced = msgspec.structs.replace(report.bench, price_per_hour=price_per_hour)
            report = msgspec.structs.replace(report, bench=priced)
            out.write("report.json", as_json(report))
        draw(report, out)
    return report


def draw(report: Report, out: Output) -> None:
    """Write `report.md` and `report.html`."""
    drawn = page_of(report)
    out.write("report.md", page.markdown(drawn).encode())
    out.write("report.html", page.html(drawn).encode())


def page_of(report: Report) -> page.Page:
    """Return the report's verdict, facts, warnings and sections."""
    sections = [section for make in SECTIONS if (section := make(report))]
    warnings = [
        *report.bench.warnings,
        *(f"{name} {reason}" for name, reason in report.bench.failed.items()),
        *(f"{name} was left out: {reason}" for name, reason in report.bench.left_out.items()),
    ]
    title = f"{report.task}: which file to ship" if report.recommended else "Side by side"
    return page.Page(title, _verdict(report), report.budget.met is not False, _facts(report), warnings, sections)


def write_card(report: Report, file: Path) -> None:
    """Write the model card, with the metrics as a model-index."""
    task = task_class(report.task)
    card = page.render(
        "card.md.j2", r=report, best=report.variant(report.recommended), use=task.card, reads=task.modality,
        embeds=task.embeds, headers=headers(report), rows=table(report), score=partial(score, metric_of(report)),
    )  # fmt: skip
    write_text(file, card)


def write_export_card(exported: Exported, file: Path) -> None:
    """Write the model card of an export."""
    task = task_class(exported.task)
    card = page.render(
        "exported.md.j2", e=exported, reads=task.modality, use=task.card, embeds=task.embeds, version=__version__,
        percent=percent,
    )  # fmt: skip
    write_text(file, card)


def _verdict(report: Report) -> str:
    if report.recommended is None:
        return report.reason
    best = report.variant(report.recommended)
    kept = {True: " The budget is kept.", False: " The budget is NOT kept.", None: ""}[report.budget.met]
    return f"Ship {best.file} ({best.name}): {report.reason}.{kept}"


def _facts(report: Report) -> list[tuple[str, str]]:
    if report.recommended is None:
        return []
    best, reference = report.variant(report.recommended), report.variants[0]
    facts, metric = [], metric_of(report)
    if best.metric and reference.metric:
        teacher = score(metric, reference.metric.value)
        facts.append((score(metric, best.metric.value), f"{metric.name}; teacher {teacher}"))
    judged = metric.kind != "number" and metric.higher_is_better and metric.name != AGREEMENT.name
    if report.distillation and judged:
        facts.append((percent(report.distillation.retention), f"of the teacher's {metric.name} kept on the test split"))
    if best.latency_ms:
        facts.append((f"{p50(best)} ms", f"p50 for one {read_by(report)}; p99 {p99(best)} ms"))
        if rate := best.latency_ms.tokens_per_second:
            first = trimmed(best.latency_ms.first_token_p50)
            facts.append((f"{rate:,.0f}", f"tokens a second; the first after {first} ms"))
        if best.latency_ms.real_time_factor:
            facts.append((real_time(best), "real-time factor: seconds of computing for a second of recording"))
    if best.speedup_p50:
        value, ci = best.speedup_p50.value, best.speedup_p50.ci95
        facts.append((f"{trimmed(value, ci)}×", f"faster than {report.bench.reference}{between(ci, value)}"))
    sizes = reference.size_bytes, best.size_bytes
    smaller = f"; {sizes[0] / sizes[1]:.0f}× smaller" if sizes[0] and sizes[1] else ""
    facts.append((f"{megabytes(best.size_bytes)} MB", f"file{smaller}"))
    if best.latency_ms and report.bench.price_per_hour:
        cost = best.latency_ms.p50 / 3.6 * report.bench.price_per_hour * report.bench.threads
        facts.append((trimmed(cost), f"for a million answers, at {report.bench.price_per_hour:g} an hour"))
    return facts
