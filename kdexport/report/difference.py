"""Render a comparison in the terminal, and as a page."""

from kdexport.files import as_json
from kdexport.output import Output
from kdexport.report import page
from kdexport.report.charts import Axis, Bar, bars
from kdexport.report.page import Figure, Page, Section, Table
from kdexport.report.table import percent, signed, trimmed
from kdexport.report.terminal import print_line, show_table
from kdexport.results import Change, Comparison

FILES = ("compare.json", "compare.md", "compare.html")
HEADERS = ("variant", "metric", "A", "B", "change [95 %]", "verdict", "how")
_UNITS = {"p50": "ms", "p90": "ms", "p99": "ms", "cold": "ms", "size": "MB", "memory": "MB", "speedup": "×"}


def show_comparison(found: Comparison) -> None:
    """Print changes, notes and gates."""
    print_line(f"A {found.a}\nB {found.b}")
    show_table(HEADERS, [_row(change) for change in found.changes])
    for note in found.notes:
        print_line(f"note: {note}")
    for gate in found.gates:
        print_line(f"gate {gate.expression}: {gate.status.upper()}; {gate.why}")


def write_comparison(found: Comparison, out: Output) -> None:
    """Write compare.json, compare.md and compare.html into a folder."""
    drawn = page_of(found)
    contents = (as_json(found), page.markdown(drawn).encode(), page.html(drawn).encode())
    for name, content in zip(FILES, contents, strict=True):
        out.write(name, content)


def page_of(found: Comparison) -> Page:
    """Return a page with the verdict of the gates, and tables and charts of the changes with their intervals."""
    failed = [gate.expression for gate in found.gates if gate.status == "failed"]
    unsure = sum(gate.status == "unsure" for gate in found.gates)
    if failed:
        verdict = f"{len(failed)} of {len(found.gates)} gates failed: {', '.join(failed)}."
    elif unsure:
        verdict = f"{unsure} of {len(found.gates)} gates could not be decided."
    elif found.gates:
        verdict = f"All {len(found.gates)} gates passed."
    else:
        known = [f"{c.metric} of {c.variant}: {c.verdict}" for c in found.changes if c.verdict in ("better", "worse")]
        verdict = f"{'; '.join(known)}." if known else "Nothing is better or worse beyond doubt."
    changes = Table(HEADERS, [_row(c) for c in found.changes])
    sections = [Section("Changes", f"From A, {found.a}, to B, {found.b}.", tables=[changes], brief=True)]
    if found.gates:
        rows = [(gate.expression, gate.status, gate.why) for gate in found.gates]
        lead = "A gate fails, or passes, only where its whole 95 % interval does."
        sections.append(Section("Gates", lead, tables=[Table(("fails if", "status", "why"), rows)], brief=True))
    for unit, title in (("%", "Times, sizes and ratios"), ("points", "Accuracy and agreement")):
        if drawn := [c for c in found.changes if c.unit == unit and c.change is not None]:
            sections.append(Section(title, "B against A; 0 is no change.", [_figure(drawn, unit)]))
    good = False if failed else None if unsure else True
    return Page("What changed from A to B", verdict, good, [], found.notes, sections)


def _figure(changes: list[Change], unit: str) -> Figure:
    style = {"better": 2, "worse": 1}
    drawn = [
        Bar(f"{c.metric} of {c.variant}", c.change or 0.0, c.ci95, f"{_change(c)}, {c.verdict}", 0.0,
            style.get(c.verdict, 6))
        for c in changes
    ]  # fmt: skip
    bounds = (bound for c in changes for bound in c.ci95 or ())
    reach = (-5.0, 0.0, 5.0) if unit == "%" else (0.0, *bounds)  # a busy machine widens those of times alone
    chart = bars(f"Changes in {unit}", drawn, Axis(f"change, {unit}", signed, reach=reach))
    return Figure(f"Change in {unit}, with 95 % intervals", chart, Table(HEADERS, [_row(c) for c in changes]))


def _row(c: Change) -> tuple[str, ...]:
    return (c.variant, c.metric, _value(c, c.a), _value(c, c.b), _change(c), c.verdict, c.how)


def _value(c: Change, value: float | None) -> str:
    if value is None:
        return "–"
    if c.metric in _UNITS:
        return f"{trimmed(value)} {_UNITS[c.metric]}"
    return percent(value) if c.unit == "points" else f"{value:.3f}"


def _change(c: Change) -> str:
    if c.change is None:
        return "–"
    digits = 1 if abs(c.change) < 1000 else 0
    low, high = c.ci95 or (0.0, 0.0)
    ci = f" [{low:+,.{digits}f}, {high:+,.{digits}f}]" if low != high else ""
    return f"{c.change:+,.{digits}f}{' %' if c.unit == '%' else ' points'}{ci}".replace("-", "−")
